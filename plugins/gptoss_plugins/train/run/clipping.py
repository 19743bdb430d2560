"""The norm of all gradients together, over all ranks, and clipping by it.

megatron-core's own, without Apex, rounds bfloat16 norms to three digits, waits for the GPU at every
tensor, and copies every gradient to scale it. Which gradients count on which rank is megatron-core's:
every weight of the model once, whatever the layout.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_plugins.train.run.adam import Adam

if TYPE_CHECKING:
    from collections.abc import Iterator


def parts_of(optimizer: Any) -> Iterator[Any]:
    """megatron-core's optimizers of this rank: of dense weights, of experts."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            yield part


@torch.no_grad()
def clip(optimizer: Any, most: float, device: torch.device) -> float:
    """Clip the gradients of a step, so that their L2 norm is ``most`` at most, if that is not 0.

    Returns:
        the norm before; all ranks call this together, between ``prepare_grads`` and the step.

    """
    total = 0.0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for gradient in part.get_main_grads_for_grad_norm():
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            squares += norm.double().square()
        dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += float(squares)
    norm = math.sqrt(total)
    scale = most / (norm + 1e-6) if 0 < most < norm else 1.0
    for part in parts_of(optimizer):
        _scale(part, scale)
    return norm


def _scale(part: Any, scale: float) -> None:
    if isinstance(part.optimizer, Adam):
        part.optimizer.grad_scale = scale
    elif scale != 1.0:
        for parameter in part.get_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
