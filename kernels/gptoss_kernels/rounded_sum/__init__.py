"""A change added to weights in float32 and rounded once, with what the rounding costs, in one pass.

>>> import torch
>>> from gptoss_kernels.rounded_sum import rounded_sum
>>> weight, made = torch.ones(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.bfloat16)
>>> rounded_sum(weight, torch.tensor([0.5, 0.001]), 2.0, made)
Rounding(elements=2, kept=1, largest=0.0020000934600830078, squares=4.000373848794016e-06, power=5.004003999940149, nonfinite=0)
>>> made
tensor([2., 1.], dtype=torch.bfloat16)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gptoss_kernels.backends import has_numba
from gptoss_kernels.rounded_sum import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rounding", "rounded_sum"]
_LEAST = 1 << 16  # elements from which on loading numba is worth it


class Rounding(NamedTuple):
    """Counts and sums over the sums ``x`` and what they were rounded to; of finite ``x`` only.

    Attributes:
        elements: how many there are.
        kept: those that rounding did not change.
        largest: the largest absolute error.
        squares: sum of the squared errors.
        power: sum of the squared ``x``.
        nonfinite: ``x`` that are NaN or infinite.

    """

    elements: int
    kept: int
    largest: float
    squares: float
    power: float
    nonfinite: int


def rounded_sum(weight: Tensor, change: Tensor, scale: float, out: Tensor) -> Rounding:
    """``out = weight + scale * change``: product and sum rounded to float32, as torch does, and the
    sum to the type of ``out``, to nearest even.

    Args:
        weight: bfloat16, float16 or float32, of any shape, on a CPU.
        change: float32, of the same shape; contiguous, and overwritten.
        scale: used as float32.
        out: bfloat16, float16 or float32, of the same shape; contiguous.

    Raises:
        OverflowError: a finite sum became infinite.

    """
    compiled = (
        weight.dtype == torch.bfloat16
        and out.dtype in (torch.bfloat16, torch.float32)
        and weight.is_contiguous()
        and weight.numel() >= _LEAST
        and has_numba()
    )
    if not compiled:
        return Rounding(*reference.rounded_sum(weight, change, scale, out))
    from gptoss_kernels.rounded_sum import numba

    return Rounding(*numba.rounded_sum(weight, change, scale, out))
