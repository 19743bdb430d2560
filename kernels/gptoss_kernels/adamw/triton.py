"""AdamW on the GPU by Triton: each tensor is read once and written once.

Products and sums are rounded one by one, as in the reference, and not fused: what the compiler fuses
would depend on how weights are stored.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_kernels.adamw import Factors

_TILE, _WARPS = 1024, 4
_NAN = tl.constexpr(0x7FC0)  # upper half


def step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None,
    factors: Factors,
) -> None:
    """As ``gptoss_kernels.adamw.step_``, which has checked and flattened the arguments."""
    count = len(param)
    split = remainder is not None
    weights = (param.view(torch.int16), remainder) if split else (param, param)
    with torch.cuda.device_of(param):
        _step[triton.cdiv(count, _TILE),](
            *weights, grad, exp_avg, exp_avg_sq, count, *factors, split, _TILE,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _step(
    param, remainder, grad, exp_avg, exp_avg_sq, count,
    decay, fresh1, beta2, fresh2, root, eps, rate, scale, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    there = lane < tl.minimum(count - first, TILE).to(tl.int32)
    weights, lowers, means, squares = (
        param + first + lane, remainder + first + lane, exp_avg + first + lane, exp_avg_sq + first + lane,
    )  # fmt: skip
    gradient = tl.load(grad + first + lane, there, 0.0).to(tl.float32) * scale
    mean = tl.load(means, there, 0.0).to(tl.float32)
    square = tl.load(squares, there, 0.0).to(tl.float32)
    if SPLIT:
        weight = _joined(tl.load(weights, there, 0), tl.load(lowers, there, 0))
    else:
        weight = tl.load(weights, there, 0.0).to(tl.float32)
    apart = gradient - mean
    if fresh1 < 0.5:  # the two are equal, but for how they round; torch's lerp does so, too
        mean += fresh1 * apart
    else:
        mean = gradient - apart * (1.0 - fresh1)
    square = square * beta2 + fresh2 * gradient * gradient
    root_square = tl.div_rn(tl.sqrt_rn(square), root + tl.zeros_like(square))
    weight = weight * decay - tl.div_rn(rate * mean, root_square + eps)
    tl.store(means, mean.to(exp_avg.dtype.element_ty), there)
    tl.store(squares, square.to(exp_avg_sq.dtype.element_ty), there)
    if SPLIT:
        upper, lower = _split(weight)
        tl.store(weights, upper, there)
        tl.store(lowers, lower, there)
    else:
        tl.store(weights, weight.to(param.dtype.element_ty), there)


@triton.jit
def _joined(upper, lower):
    """``master.join`` of the bits, int16."""
    lower = lower.to(tl.int32)
    bits = ((upper.to(tl.int32) + (lower >> 15)) << 16) | (lower & 0xFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _split(weight):
    """``master.split``, as bits, int16."""
    bits = weight.to(tl.int32, bitcast=True)
    lower = (bits << 16) >> 16
    upper = (bits >> 16) - (lower >> 15)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, _NAN, upper).to(tl.int16), tl.where(nan, 0, lower).to(tl.int16)
