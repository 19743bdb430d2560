"""The norm of all gradients together, over all ranks; and clipping where megatron-core cannot.

Its own asks for CUDA tensors by name. The norm counts every weight of the model once, whatever the
layout: those that tensor-parallel ranks hold alike on the first of them, experts on the ranks that have
them, and each data-parallel rank has the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


def gradient_norm(chunks: Iterable[Any]) -> float:
    """The L2 norm, by all ranks together."""
    dense = torch.zeros((), dtype=torch.float64)
    experts = torch.zeros((), dtype=torch.float64)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for parameter, gradient in _gradients(chunks):
        square = gradient.double().pow(2).sum().cpu()
        if not getattr(parameter, "allreduce", True):
            experts += square
        elif first or getattr(parameter, "tensor_model_parallel", False):
            dense += square
    place = next(parameter for parameter, _ in _gradients(chunks)).device
    sums = torch.stack([dense, experts]).to(place)
    parts = [sums[:1].contiguous(), sums[1:].contiguous()]
    groups = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    for part, group in zip(parts, groups, strict=True):
        dist.all_reduce(part, group=group)
    return float(torch.cat(parts).sum().sqrt())


def clip(chunks: Iterable[Any], norm: float, most: float) -> None:
    """Scale all gradients so that their norm is ``most`` at most."""
    if norm > most > 0:
        for _, gradient in _gradients(chunks):
            gradient.mul_(most / (norm + 1e-6))


def _gradients(chunks: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                yield parameter, parameter.main_grad
