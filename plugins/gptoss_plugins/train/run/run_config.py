"""``run_config.yaml`` beside a run's adapters: without it nothing tells their scale, nor their base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_plugins.adapter.torch_dist import Trained, with_adapter
from gptoss_plugins.megatron.folder import RUN_CONFIG
from gptoss_plugins.megatron.sidecars import run_config_of
from gptoss_plugins.train.architecture import megatron_fields
from gptoss_plugins.train.ranks import layout_of

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainingConfig


def run_config_files(config: TrainingConfig) -> dict[str, bytes]:
    """Name in the checkpoint's folder -> bytes; nothing for a run that trains all weights."""
    lora = config.peft
    if lora is None:
        return {}
    trained = Trained(
        lora.dim,
        lora.alpha,
        lora.target_modules,
        lora.share_expert_adapters,
        config.checkpoint.pretrained_checkpoint,
        lora.dropout,
    )
    dtype = "BF16" if config.mixed_precision.bf16 else "F32"
    plain = run_config_of(megatron_fields(config.model), dtype, layout_of(config.model))
    return {RUN_CONFIG: with_adapter(plain, trained)}
