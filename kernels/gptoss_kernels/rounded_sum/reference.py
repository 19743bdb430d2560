"""In plain torch, a pass for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rounded_sum(
    weight: Tensor, change: Tensor, scale: float, out: Tensor
) -> tuple[int, int, float, float, float, int]:
    """As ``gptoss_kernels.rounded_sum``."""
    exact = change.mul_(torch.tensor(scale, dtype=torch.float32)).add_(weight)
    out.copy_(exact)
    finite = exact.isfinite()
    values, rounded = exact[finite].double(), out[finite].double()
    if not bool(rounded.isfinite().all()):
        raise OverflowError(f"is too large for {out.dtype}")
    error = rounded - values
    return (
        exact.numel(),
        len(values) - int(error.count_nonzero()),
        float(error.abs().max()) if len(error) else 0.0,
        float(error.square().sum()),
        float(values.square().sum()),
        exact.numel() - len(values),
    )
