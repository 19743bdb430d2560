"""AdamW in plain torch: for CPUs, and what Triton must match.

The operations are those of ``torch.optim.AdamW`` on float32, one after the other, so the bits are its
bits. Elements go in pieces, which mostly stay in a CPU's cache from one operation to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_kernels.adamw.master import join, split

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_kernels.adamw import Factors

_PIECE = 1 << 20  # elements; with fewer, threads mostly wait for each other


def step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None,
    factors: Factors,
) -> None:
    """As ``gptoss_kernels.adamw.step_``, which has checked and flattened the arguments."""
    for at in range(0, len(param), _PIECE):
        piece = slice(at, at + _PIECE)
        weight, low = param[piece], None if remainder is None else remainder[piece]
        master = weight.float() if low is None else join(weight, low)
        _step(master, grad[piece].float(), exp_avg[piece], exp_avg_sq[piece], factors)
        if low is None:
            weight.copy_(master)  # onto itself if it is float32
        else:
            upper, lower = split(master)
            weight.copy_(upper)
            low.copy_(lower)


def _step(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, factors: Factors) -> None:
    """Change the weight, float32 as the gradient, and the moments."""
    decay, fresh1, beta2, fresh2, root, eps, rate, scale = factors
    if scale != 1.0:
        grad = grad * scale
    mean, square = first.float(), second.float()
    mean.lerp_(grad, fresh1)
    square.mul_(beta2).addcmul_(grad, grad, value=fresh2)
    weight.mul_(decay).addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-rate)
    first.copy_(mean)
    second.copy_(square)
