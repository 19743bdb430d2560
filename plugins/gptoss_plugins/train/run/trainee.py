"""This rank's part of what is trained: model chunks, gradients, optimizer, schedule of the rates.

Parallelism is megatron-core's: its DistributedDataParallel, distributed optimizer and schedules.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from gptoss_plugins.adapter.modules import add_adapters
from gptoss_plugins.gpt_model.live import build_live
from gptoss_plugins.train.architecture import hf_config, megatron_fields
from gptoss_plugins.train.ranks import layout_of
from gptoss_plugins.train.run.adam import Adam, PreciseConfig, in_place_of_transformer_engines
from gptoss_plugins.train.run.clipping import parts_of
from gptoss_plugins.train.run.drawing import draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gptoss_convert.registry import Registry
    from gptoss_plugins.gpt_model.live import LiveModel
    from gptoss_plugins.train.config import TrainingConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Ours -> megatron-core's, where the model's own config says it.
_RECOMPUTE = ("granularity", "method", "num_layers", "modules")


@dataclass
class Trainee:
    """What a step changes.

    Attributes:
        live: the model, as loading and saving see it.
        chunks: its modules, wrapped for training.
        optimizer: megatron-core's.
        scheduler: moves learning rate and weight decay, a step at a time.
        clips: largest norm of the gradients; 0 for any.
        optimizers: the context in which megatron-core handles the optimizer's state.
        optimizer_kind: what decides which state it is, as plain values.
        has_adapters: adapters are trained, and the model's own weights are not.

    """

    live: LiveModel
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    clips: float
    optimizers: Callable[[], contextlib.AbstractContextManager[None]]
    optimizer_kind: Mapping[str, Any]
    has_adapters: bool = False

    def take_masters(self) -> None:
        """The weights were loaded: make the optimizer's own copies anew."""
        self.optimizer.reload_model_params()
        for part in parts_of(self.optimizer):
            if isinstance(part.optimizer, Adam):
                part.optimizer.forget_masters()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, all weights are there; each is gathered as it is needed, otherwise, if they overlap."""
        late = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in late:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in late:
            chunk.enable_forward_pre_hook()


def build_trainee(
    config: TrainingConfig, registry: Registry, place: torch.device, *, random_weights: bool
) -> Trainee:
    """Build everything, with random weights or undefined ones, which are to be loaded."""
    dtype = torch.bfloat16 if config.mixed_precision.bf16 else torch.float32
    live = build_live(
        megatron_fields(config.model),
        layout_of(config.model),
        registry,
        place,
        dtype,
        training=True,
        overrides={
            "cross_entropy_loss_fusion": config.model.cross_entropy_loss_fusion,
            **_recompute(config),
            **_exchange(config),
        },
    )
    if random_weights:
        draw(live, hf_config(config.model), config.rng.seed)
    if config.peft is not None:
        add_adapters(live, config.peft, config.rng.seed)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=config.ddp.overlap_grad_reduce,
        overlap_param_gather=config.ddp.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=config.ddp.check_for_nan_in_grad,
        bucket_size=config.ddp.bucket_size,
        average_in_collective=config.ddp.average_in_collective,
    )
    chunks = []
    for number, model in enumerate(live.models):
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.calculate_per_token_loss = config.model.calculate_per_token_loss
        inner = Float16Module(model.config, model) if config.mixed_precision.bf16 else model
        chunks.append(
            DistributedDataParallel(
                config=model.config, ddp_config=ddp, module=inner, disable_bucketing=number > 0
            )
        )
    if config.ddp.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in chunks]
        for model in live.models:
            model.config.no_sync_func = waits if len(waits) > 1 else waits[0]
    optimizers = in_place_of_transformer_engines if _is_precise(config) else contextlib.nullcontext
    with optimizers():
        optimizer = get_megatron_optimizer(_optimizer(config, dtype), chunks)
    if place.type == "cuda":
        for model in live.models:
            model.config.grad_scale_func = optimizer.scale_loss
    rates_ = _scheduler(config, optimizer)
    most = config.optimizer.clip_grad
    kind = {
        "optimizer": config.optimizer.optimizer,
        "distributed": config.optimizer.use_distributed_optimizer,
        "precision": "bf16_mixed" if dtype == torch.bfloat16 else "fp32",
    }
    has = config.peft is not None
    return Trainee(live, chunks, optimizer, rates_, most, optimizers, kind, has)


def _exchange(config: TrainingConfig) -> dict[str, Any]:
    """How stages of several chunks exchange activations.

    Batched, what two stages send each other forth and back at once would be taken for one another.
    """
    several = (config.model.virtual_pipeline_model_parallel_size or 1) > 1
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False} if several else {}


def _is_precise(config: TrainingConfig) -> bool:
    """Whether the optimizer is ours within megatron-core's: AdamW, distributed."""
    own = config.optimizer
    return own.use_distributed_optimizer and own.optimizer == "adam"


def _recompute(config: TrainingConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _RECOMPUTE:
        value = getattr(config.model, f"recompute_{name}")
        if value is not None:
            found[f"recompute_{name}"] = list(value) if isinstance(value, tuple) else value
    modules = found.get("recompute_modules", [])
    if "moe_act" in modules:  # which megatron-core has for Transformer Engine's experts only
        modules.remove("moe_act")
        found["recompute_activation"] = True
        if not modules:
            del found["recompute_granularity"], found["recompute_modules"]
    return found


def _optimizer(config: TrainingConfig, dtype: torch.dtype) -> OptimizerConfig:
    own = config.optimizer
    kind = PreciseConfig if _is_precise(config) else OptimizerConfig
    moments = {"exp_avg_dtype": own.exp_avg_dtype, "exp_avg_sq_dtype": own.exp_avg_sq_dtype}
    return kind(
        **{name: _DTYPES[said] for name, said in moments.items()},
        optimizer=own.optimizer,
        lr=own.lr,
        min_lr=own.min_lr,
        weight_decay=own.weight_decay,
        adam_beta1=own.adam_beta1,
        adam_beta2=own.adam_beta2,
        adam_eps=own.adam_eps,
        sgd_momentum=own.sgd_momentum,
        clip_grad=0.0,  # see clipping.py
        use_distributed_optimizer=own.use_distributed_optimizer,
        overlap_param_gather=config.ddp.overlap_param_gather,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )


def _scheduler(config: TrainingConfig, optimizer: Any) -> OptimizerParamScheduler:
    rates, own, iters = config.scheduler, config.optimizer, config.train.train_iters
    decay = {"start": rates.start_weight_decay, "end": rates.end_weight_decay}
    weights = {k: own.weight_decay if v is None else v for k, v in decay.items()}
    return OptimizerParamScheduler(
        optimizer,
        init_lr=rates.lr_warmup_init,
        max_lr=own.lr,
        min_lr=own.min_lr,
        lr_warmup_steps=rates.lr_warmup_iters,
        lr_decay_steps=rates.lr_decay_iters or iters,
        lr_decay_style=rates.lr_decay_style,
        start_wd=weights["start"],
        end_wd=weights["end"],
        wd_incr_steps=iters,
        wd_incr_style=rates.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=rates.lr_wsd_decay_iters,
        lr_wsd_decay_style=rates.lr_wsd_decay_style,
    )


def rates(trainee: Trainee) -> Mapping[str, float]:
    """The learning rate and the weight decay of the coming step."""
    groups = trainee.optimizer.param_groups
    return {
        "lr": max(float(group["lr"]) for group in groups),
        "weight_decay": max(float(group["weight_decay"]) for group in groups),
    }
