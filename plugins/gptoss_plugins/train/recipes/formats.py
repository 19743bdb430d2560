"""The number formats that recipes come in beside bf16."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gptoss_plugins.train.config import NAMED

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainingConfig


def in_fp8_current_scaling(config: TrainingConfig) -> TrainingConfig:
    """FP8 with a scale per tensor, as Hopper has it; first and last layer in bf16."""
    return _in(config, "bf16_with_fp8_current_scaling_mixed")


def in_mxfp8(config: TrainingConfig) -> TrainingConfig:
    """FP8 with a scale per 32 values, as Blackwell has it."""
    return _in(config, "bf16_with_mxfp8_mixed")


def _in(config: TrainingConfig, name: str) -> TrainingConfig:
    config = config.having(model={"moe_router_padding_for_fp8": True})
    return dataclasses.replace(config, mixed_precision=NAMED[name])
