"""What training asks of the machine, before anything is read or built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptoss_convert.errors import ConfigError

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainingConfig


def require_place(config: TrainingConfig, device: str | None) -> None:
    """Refuse on a CPU what megatron-core's optimizer does on CUDA alone.

    Raises:
        ConfigError: with what to say instead.

    """
    if device != "cpu" and (device is not None or torch.cuda.is_available()):
        return
    wrong = []
    if config.mixed_precision.bf16:
        wrong.append(("bfloat16", "mixed_precision=fp32"))
    if config.optimizer.use_distributed_optimizer:
        wrong.append(("the distributed optimizer", "optimizer.use_distributed_optimizer=false"))
    if wrong:
        raise ConfigError(
            f"on a CPU megatron-core trains neither in bfloat16 nor with its distributed optimizer, and "
            f"the config asks for {' and '.join(what for what, _ in wrong)}; say "
            f"{' '.join(say for _, say in wrong)}, or train on GPUs"
        )
