"""Cross-entropy in plain torch, float32 inside: for CPUs, and what Triton must match.

Rows go in blocks: as float32, all of them would need more memory than the logits have.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOGITS = 1 << 22  # float32 numbers in memory at a time, if a row has no more


def logsumexp(logits: Tensor) -> Tensor:
    """As ``gptoss_kernels.cross_entropy.logsumexp``, which has checked the arguments."""
    made = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _blocks(logits):
        torch.logsumexp(logits[rows].float(), 1, out=made[rows])
    return made


def gradient_(logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor) -> None:
    """As ``gptoss_kernels.cross_entropy.gradient_``, which has checked the arguments."""
    column = torch.arange(logits.shape[1], device=logits.device)
    for rows in _blocks(logits):
        gradient = (logits[rows].float() - lse[rows, None]).exp_()
        gradient -= (column == labels[rows, None]).float()
        gradient *= weights[rows, None]
        logits[rows] = gradient.masked_fill_(weights[rows, None] == 0, 0.0)


def _blocks(logits: Tensor) -> list[slice]:
    step = max(1, _LOGITS // max(1, logits.shape[1]))
    return [slice(at, at + step) for at in range(0, len(logits), step)]
