"""Models for one rank of a layout: ours, and megatron-core's own; groups real or for show."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny_gptoss import YARN, megatron_fields
from torch.testing._internal.distributed.fake_pg import FakeStore

from gptoss_plugins.gpt_model.build import build_gpt_model
from gptoss_plugins.gpt_model.cpu_shim import cuda_means_cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.layout import Layout


@dataclass(frozen=True)
class Sizes:
    """Of a model; letters as in ``gptoss_convert.ops``."""

    layers: int
    groups: int
    heads_per_group: int = 3
    head_dim: int = 2
    hidden: int = 14
    width: int = 5
    experts: int = 4
    vocabulary: int = 37

    def config(self) -> dict[str, Any]:
        """As Hugging Face has it."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_attention_heads": self.groups * self.heads_per_group,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "num_local_experts": self.experts,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "sliding_window": 9,
            "layer_types": ["full_attention"] * self.layers,
            "max_position_embeddings": 64,
            "attention_bias": True,
            "hidden_act": "silu",
            "rope_parameters": YARN,
        }


@contextlib.contextmanager
def pretend(rank: int, layout: Layout, world: int | None = None) -> Iterator[None]:
    """This process as one rank of a world; its groups exchange nothing."""
    world = world or layout.world
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with groups(layout):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def groups(layout: Layout) -> Iterator[None]:
    """megatron-core's groups for a layout, in the world there is."""
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,  # beside the world's own backend
    )
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def stages_of(layout: Layout) -> dict[str, Any]:
    """TransformerConfig's fields for uneven stages."""
    if not layout.stages:
        return {
            "num_layers_in_first_pipeline_stage": layout.first,
            "num_layers_in_last_pipeline_stage": layout.last,
        }
    chunks = [["decoder"] * count for count in layout.stages]
    chunks[0], chunks[-1] = ["embedding", *chunks[0]], [*chunks[-1], "loss"]
    return {"pipeline_model_parallel_layout": chunks}


def our_model(sizes: Sizes, layout: Layout, rows: int, vp_stage: int | None) -> GPTModel:
    fields = megatron_fields(sizes.config()) | {"vocab_size": rows}
    return build_gpt_model(
        fields, dtype=torch.float32, vp_stage=vp_stage, overrides=stages_of(layout)
    )


def stock_model(sizes: Sizes, layout: Layout, rows: int, vp_stage: int | None) -> GPTModel:
    """megatron-core's own modules, experts one by one, in TransformerConfig's own words."""
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.width,
        moe_ffn_hidden_size=sizes.width,
        num_attention_heads=sizes.groups * sizes.heads_per_group,
        num_query_groups=sizes.groups,
        kv_channels=sizes.head_dim,
        num_moe_experts=sizes.experts,
        moe_router_topk=2,
        moe_token_dispatcher_type="allgather",
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        softmax_type="learnable",
        normalization="RMSNorm",
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        **stages_of(layout),
    )
    # Set late, since the config refuses biases of experts under ETP: it cannot compute with them.
    # Its layers cut them all the same, and that is the only definition there is.
    config.add_bias_linear = True
    spec = get_gpt_layer_local_spec(num_experts=sizes.experts, normalization="RMSNorm")
    layers = [spec] * get_num_layers_to_build(config, vp_stage=vp_stage)
    ends = {"ignore_virtual": False, "vp_stage": vp_stage}
    with cuda_means_cpu():
        return GPTModel(
            config,
            TransformerBlockSubmodules(layers, layer_norm=spec.submodules.input_layernorm),
            vocab_size=rows,
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="none",
            vp_stage=vp_stage,
        )


MODELS = {"ours": our_model, "stock": stock_model}
