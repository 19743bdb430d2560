"""What of a config does not go together: every problem at once, each in a sentence."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from gptoss_convert.errors import PlanError, UsageError
from gptoss_plugins.data.sft.system import is_date
from gptoss_plugins.train import nearest
from gptoss_plugins.train.architecture import megatron_fields
from gptoss_plugins.train.layout_checks import layout_problems, size_problems
from gptoss_plugins.train.reading import NUMBER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.train.config import SftDataset, TrainingConfig

_KEEP = "checkpoint.most_recent_k"
_MOST_SAMPLES = 1 << 36


class RecipeError(PlanError, UsageError):
    """A config asks for what does not go together; ``problems`` has every sentence."""

    exit_code = UsageError.exit_code


def check(config: TrainingConfig, world_size: int | None = None) -> Iterator[str]:
    """Every problem of a config, each with the nearest value that works.

    Args:
        config: with all overrides.
        world_size: processes there are; None for as many as the layout takes.

    """
    if sizes := list(size_problems(config.model)):
        yield from sizes
    else:
        yield from layout_problems(config, world_size)
        yield from _recomputation(config)
    yield from _schedule(config)
    yield from _gradients(config)
    yield from _formats(config)
    yield from _data(config)
    yield from _adapters(config)
    if (samples := config.train.train_iters * config.train.global_batch_size) > _MOST_SAMPLES:
        yield (
            f"train.train_iters {config.train.train_iters:.0e} makes {samples:.0e} samples, more than any "
            f"run takes; say train.train_iters={_MOST_SAMPLES // config.train.global_batch_size}"
        )
    if config.checkpoint.most_recent_k == 0:
        yield f"{_KEEP} 0 keeps no checkpoint; say {_KEEP}=1, or {_KEEP}=-1 for all"


def require_sound(config: TrainingConfig, world_size: int | None = None) -> None:
    """Refuse a config that has problems.

    Raises:
        RecipeError: listing all.

    """
    if problems := list(check(config, world_size)):
        raise RecipeError("the recipe", problems)


def _adapters(config: TrainingConfig) -> Iterator[str]:
    if config.peft is None:
        return
    if not config.peft.target_modules:
        yield "peft.target_modules is empty, and nothing would be trained; say peft.target_modules=[linear_qkv]"
    if config.peft.alpha == 0:
        yield "peft.alpha 0 makes adapters that change nothing; say peft.alpha=32"


def _recomputation(config: TrainingConfig) -> Iterator[str]:
    model, name = config.model, "model.recompute"
    if model.recompute_granularity == "full":
        if model.recompute_method is None:
            yield f"{name}_granularity full needs a method; say {name}_method=uniform"
        if model.recompute_num_layers is None:
            yield f"{name}_granularity full needs a number of layers; say {name}_num_layers=1"
        stage = megatron_fields(model)["num_layers"] // model.pipeline_model_parallel_size
        if (model.recompute_num_layers or 0) > stage >= 1:
            yield (
                f"{name}_num_layers {model.recompute_num_layers} is more than the {stage} layers of a "
                f"stage; say {name}_num_layers={stage}"
            )
        return
    for field in ("method", "num_layers"):
        if getattr(model, f"recompute_{field}") is not None:
            yield f"{name}_{field} is for {name}_granularity full; say {name}_{field}=null"
    if "layernorm" in (model.recompute_modules or ()):
        yield (
            f"{name}_modules layernorm: megatron-core 0.16 recomputes norms with Transformer Engine "
            f"only; leave it out"
        )
    if model.recompute_modules is not None and model.recompute_granularity is None:
        yield f"{name}_modules is for {name}_granularity selective; say {name}_granularity=selective"


def _schedule(config: TrainingConfig) -> Iterator[str]:
    optimizer, scheduler = config.optimizer, config.scheduler
    last = scheduler.lr_decay_iters or config.train.train_iters
    what = "scheduler.lr_decay_iters" if scheduler.lr_decay_iters else "train.train_iters"
    if scheduler.lr_warmup_iters >= last:
        yield (
            f"scheduler.lr_warmup_iters {scheduler.lr_warmup_iters} is not less than {what} {last}; "
            f"say scheduler.lr_warmup_iters={last - 1}"
        )
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr {optimizer.min_lr:g} is more than optimizer.lr {optimizer.lr:g}; say "
            f"optimizer.min_lr={optimizer.lr:g}"
        )
    if scheduler.lr_warmup_init > optimizer.lr:
        yield (
            f"scheduler.lr_warmup_init {scheduler.lr_warmup_init:g} is more than optimizer.lr "
            f"{optimizer.lr:g}; say scheduler.lr_warmup_init=0"
        )
    is_wsd, down = scheduler.lr_decay_style == "WSD", scheduler.lr_wsd_decay_iters
    if is_wsd and (down is None or down > last):
        yield (
            f"scheduler.lr_decay_style WSD needs scheduler.lr_wsd_decay_iters, {last} at most; say "
            f"scheduler.lr_wsd_decay_iters={last if down else max(1, last // 10)}"
        )
    start, end = (
        optimizer.weight_decay if one is None else one
        for one in (scheduler.start_weight_decay, scheduler.end_weight_decay)
    )
    if end < start or (end != start and scheduler.weight_decay_incr_style == "constant"):
        yield (
            f"the weight decay goes from {start:g} to {end:g} by scheduler.weight_decay_incr_style "
            f"{scheduler.weight_decay_incr_style}, which megatron-core has not; say "
            f"scheduler.end_weight_decay={start:g}"
        )


def _gradients(config: TrainingConfig) -> Iterator[str]:
    ddp, own = config.ddp, config.optimizer
    if own.optimizer != "adam" and own.use_distributed_optimizer:
        yield (
            f"optimizer.optimizer {own.optimizer} does not go with the distributed optimizer; say "
            f"optimizer.use_distributed_optimizer=false"
        )
    for moment in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        is_there = own.optimizer == "adam" and own.use_distributed_optimizer
        if getattr(own, moment) != "fp32" and not is_there:
            yield (
                f"optimizer.{moment} {getattr(own, moment)} is for adam with the distributed "
                f"optimizer; say optimizer.{moment}=fp32"
            )
    if ddp.average_in_collective and config.model.calculate_per_token_loss:
        yield (
            "ddp.average_in_collective does not go with model.calculate_per_token_loss; say "
            "ddp.average_in_collective=false"
        )
    if ddp.overlap_param_gather and not config.optimizer.use_distributed_optimizer:
        yield (
            "ddp.overlap_param_gather needs optimizer.use_distributed_optimizer; say "
            "ddp.overlap_param_gather=false"
        )
    elif ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        yield "ddp.overlap_param_gather needs ddp.overlap_grad_reduce; say ddp.overlap_grad_reduce=true"


def _formats(config: TrainingConfig) -> Iterator[str]:
    precision = config.mixed_precision
    if precision.fp8 is None:
        return
    if not precision.bf16:
        yield "mixed_precision.fp8 needs mixed_precision.bf16; say mixed_precision.bf16=true"
    if importlib.util.find_spec("transformer_engine") is None:
        kind = "MXFP8" if precision.fp8_recipe == "mxfp8" else "FP8"
        yield (
            f"mixed_precision: {kind} needs Transformer Engine, which is not installed; install "
            f"transformer_engine, or say mixed_precision=bf16_mixed"
        )
    is_mxfp8_gather = precision.fp8_recipe == "mxfp8" and precision.fp8_param_gather
    if is_mxfp8_gather and not precision.reuse_grad_buf_for_mxfp8_param_ag:
        name = "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag"
        yield f"mixed_precision.fp8_param_gather with mxfp8 needs {name}; say {name}=true"


def _data(config: TrainingConfig) -> Iterator[str]:
    data = config.dataset
    if data.kind == "sft":
        yield from _questions(config, data)
        return
    paths, weights = data.blend or ((), None)
    if data.blend is not None and not paths:
        yield "dataset.blend has no files; say dataset.blend=null for random tokens"
    if weights is not None and (len(weights) != len(paths) or not sum(weights)):
        yield (
            f"dataset.blend has {len(paths)} files and {len(weights)} weights, which have to be as "
            f"many and not all 0; say null in place of the weights for weights by size"
        )
    parts = [part.strip() for part in data.split.split(",")]
    is_split = len(parts) <= 3 and all(NUMBER.fullmatch(p) and float(p) >= 0 for p in parts)
    if not is_split or not float(parts[0]):
        yield (
            f"dataset.split {data.split!r} is not three weights, the first above 0; say "
            f"dataset.split='9999,8,2'"
        )


def _questions(config: TrainingConfig, data: SftDataset) -> Iterator[str]:
    """Of fine-tuning."""
    if data.dataset_name is None and data.dataset_root is None:
        yield (
            "dataset has neither dataset.dataset_root nor dataset.dataset_name; say "
            "dataset.dataset_name=squad"
        )
    if data.packing and config.train.micro_batch_size > 1:
        yield (
            f"train.micro_batch_size {config.train.micro_batch_size} does not go with "
            f"dataset.packing, where a pack is a batch; say train.micro_batch_size=1"
        )
    if data.packing and data.sequence_length % data.pad_seq_to_mult:
        best = nearest.multiple(data.sequence_length, data.pad_seq_to_mult)
        yield (
            f"dataset.sequence_length {data.sequence_length} is no multiple of "
            f"dataset.pad_seq_to_mult {data.pad_seq_to_mult}; say dataset.sequence_length={best} and "
            f"model.seq_length={best}"
        )
    if not data.loss_channels:
        yield "dataset.loss_channels is empty, nothing would be learned; say [final] at least"
    if data.conversation_date is not None and not is_date(data.conversation_date):
        yield (
            f"dataset.conversation_date {data.conversation_date!r} is no date; say "
            f"dataset.conversation_date=2025-08-05, or null for none"
        )
    if config.tokenizer.tokenizer_type == "NullTokenizer":
        yield (
            "tokenizer.tokenizer_type NullTokenizer reads no text, which dataset.kind sft has; say "
            "tokenizer.tokenizer_type=HuggingFaceTokenizer"
        )
