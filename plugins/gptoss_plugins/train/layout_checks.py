"""What of a config cannot be spread over ranks: layout, sequence lengths, batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gptoss_plugins.train import nearest
from gptoss_plugins.train.architecture import hf_config, megatron_fields
from gptoss_plugins.train.ranks import data_parallel, microbatches, smallest_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.train.config import ModelConfig, TrainingConfig

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
EP, CP = "model.expert_model_parallel_size", "model.context_parallel_size"


def size_problems(model: ModelConfig) -> Iterator[str]:
    """Why the sizes make no model."""
    sizes = hf_config(model)
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups:
        yield (
            f"model.num_query_groups {groups} does not divide the model's {heads} heads; say "
            f"model.num_query_groups={nearest.divisor(groups, heads)}"
        )
    if sizes["head_dim"] % 2:
        yield (
            f"model.kv_channels {sizes['head_dim']} is odd, and positions turn pairs; say "
            f"model.kv_channels={sizes['head_dim'] + 1}"
        )
    if sizes["num_experts_per_tok"] == 1:
        yield "model.moe_router_topk 1 leaves the router nothing to weigh; say model.moe_router_topk=2"
    if (chosen := sizes["num_experts_per_tok"]) > (experts := sizes["num_local_experts"]):
        yield (
            f"model.moe_router_topk {chosen} is more than the model's {experts} experts; say "
            f"model.moe_router_topk={experts}"
        )


def layout_problems(config: TrainingConfig, world_size: int | None) -> Iterator[str]:
    """A sentence each, with the nearest value that works.

    The model's own sizes have to make a model; a world of None is the smallest that fits.
    """
    need = smallest_world(config.model)
    problems = [*_cuts(config.model), *_stages(config.model)]
    yield from problems
    yield from _lengths(config)
    if problems:
        return  # mending them changes what the sequences and the batch are divided among
    yield from _parts(config)
    if world_size is not None and world_size % need:
        yield (
            f"{world_size} processes do not make up a layout of {need} (tensor x context parallel or "
            f"expert parallel ranks, whichever needs more, times pipeline stages); start "
            f"{nearest.multiple(world_size, need)}"
        )
        return  # how many sequences each would have cannot be said
    yield from _batches(config, world_size or need)


def _cuts(model: ModelConfig) -> Iterator[str]:
    """Each matrix is cut into equal parts."""
    sizes = megatron_fields(model)
    tp, ep, cp = (
        model.tensor_model_parallel_size,
        model.expert_model_parallel_size,
        model.context_parallel_size,
    )
    heads, groups, vocab = (
        sizes[name] for name in ("num_attention_heads", "num_query_groups", "vocab_size")
    )
    if any(size % tp for size in (heads, groups, vocab)):
        yield (
            f"{TP} {tp} does not divide the model's {heads} heads, {groups} query groups and {vocab} "
            f"tokens; say {TP}={nearest.divisor(tp, heads, groups, vocab)}"
        )
    elif (groups // tp) % cp:
        yield (
            f"{CP} {cp} does not divide the {groups // tp} query groups of a tensor parallel rank, "
            f"between which attention is exchanged; say {CP}={nearest.divisor(cp, groups // tp)}"
        )
    if sizes["num_moe_experts"] % ep:
        yield (
            f"{EP} {ep} does not divide the model's {sizes['num_moe_experts']} experts; say "
            f"{EP}={nearest.divisor(ep, sizes['num_moe_experts'])}"
        )
    if model.expert_tensor_parallel_size > 1:
        yield (
            f"model.expert_tensor_parallel_size {model.expert_tensor_parallel_size}: megatron-core "
            f"computes no experts with biases so; say model.expert_tensor_parallel_size=1"
        )
    if model.sequence_parallel != (tp > 1):
        state = "is on with" if model.sequence_parallel else "is off, and experts need it for"
        yield (
            f"model.sequence_parallel {state} {TP} {tp}; say "
            f"model.sequence_parallel={str(tp > 1).lower()}"
        )


def _stages(model: ModelConfig) -> Iterator[str]:
    """The layers are cut into equal stages, and those into equal chunks."""
    layers = megatron_fields(model)["num_layers"]
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if layers % pp:
        yield (
            f"{PP} {pp} does not divide the model's {layers} layers; say "
            f"{PP}={nearest.divisor(pp, layers)}"
        )
    elif vpp and pp == 1:
        yield f"{VPP} {vpp} needs several pipeline stages, and {PP} is 1; say {VPP}=null"
    elif vpp and (layers // pp) % vpp:
        yield (
            f"{VPP} {vpp} does not divide the {layers // pp} layers of a stage; say "
            f"{VPP}={nearest.divisor(vpp, layers // pp)}"
        )


def _lengths(config: TrainingConfig) -> Iterator[str]:
    """Sequences are as long as the data's, and no longer than the model takes."""
    length, longest = config.model.seq_length, megatron_fields(config.model)["seq_length"]
    if length > longest:
        yield (
            f"model.seq_length {length} is longer than the {longest} tokens that the model takes; say "
            f"model.seq_length={longest}"
        )
    if config.dataset.sequence_length != length:
        yield (
            f"dataset.sequence_length {config.dataset.sequence_length} and model.seq_length {length} "
            f"are not one; say dataset.sequence_length={length}"
        )


def _parts(config: TrainingConfig) -> Iterator[str]:
    """Sequences are cut in equal parts, twice as many as CP has ranks, then by TP."""
    model, dataset = config.model, config.dataset
    tp = model.tensor_model_parallel_size if model.sequence_parallel else 1
    cp = model.context_parallel_size
    parts = math.lcm(tp * cp, 2 * cp if cp > 1 else 1)
    if model.seq_length % parts:
        yield (
            f"model.seq_length {model.seq_length} does not divide into {parts} parts, for {TP} {tp} "
            f"and {CP} {cp}; say model.seq_length={nearest.multiple(model.seq_length, parts)}"
        )
    if dataset.kind == "sft" and dataset.packing and cp > 1 and dataset.pad_seq_to_mult % (2 * cp):
        yield (
            f"dataset.pad_seq_to_mult {dataset.pad_seq_to_mult} is no multiple of {2 * cp}, twice {CP}; "
            f"say dataset.pad_seq_to_mult={nearest.multiple(dataset.pad_seq_to_mult, 2 * cp)}"
        )


def _batches(config: TrainingConfig, world_size: int) -> Iterator[str]:
    """A step has equally many microbatches on every rank."""
    model, train = config.model, config.train
    ranks = data_parallel(model, world_size)
    at_once = train.micro_batch_size * ranks
    if train.global_batch_size % at_once:
        yield (
            f"train.global_batch_size {train.global_batch_size} is no multiple of {at_once}, which is "
            f"train.micro_batch_size {train.micro_batch_size} on {ranks} data-parallel ranks; say "
            f"train.global_batch_size={nearest.multiple(train.global_batch_size, at_once)}"
        )
        return
    pp, count = model.pipeline_model_parallel_size, microbatches(config, world_size)
    if (model.virtual_pipeline_model_parallel_size or 1) > 1 and count % pp:
        best = nearest.multiple(train.global_batch_size, at_once * pp)
        yield (
            f"train.global_batch_size {train.global_batch_size} makes {count} microbatches, and with "
            f"{VPP} they have to be a multiple of {PP} {pp}; say train.global_batch_size={best}"
        )
