"""Cross-entropy on the GPU by Triton: logits are read once for each function, and written once.

For the softmax's denominator a lane keeps the largest logit that it has met and the sum of
exponentials relative to it; lanes meet in the end only. A lane takes neighbours together, so that
the largest of them is found in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_LANES, _EACH, _WARPS = 1024, 8, 16  # of a program that reads; neighbours of a lane
_PROGRAMS = 512  # worth having, to fill a GPU
_TILE, _TILE_WARPS = 2048, 4  # of a program that writes

# The largest logit met is kept finite: then the difference of two is no NaN, and that of infinity and
# the largest is infinite still.
_LARGEST = tl.constexpr(3.4028234663852886e38)


def logsumexp(logits: Tensor) -> Tensor:
    """As ``gptoss_kernels.cross_entropy.logsumexp``, which has checked the arguments."""
    count, width = logits.shape
    tiles = triton.cdiv(width, _LANES * _EACH)
    splits = max(1, min(tiles, _PROGRAMS // max(1, count)))
    share = triton.cdiv(tiles, splits) * _LANES * _EACH
    parts = torch.empty((count, splits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _logsumexp[count, splits](
            logits, parts, logits.stride(0), width, share, _LANES, _EACH, num_warps=_WARPS
        )
    return logsumexp(parts) if splits > 1 else parts[:, 0]


def gradient_(logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor) -> None:
    """As ``gptoss_kernels.cross_entropy.gradient_``, which has checked the arguments."""
    count, width = logits.shape
    tiles = triton.cdiv(width, _TILE)
    rows = (x.contiguous() for x in (labels, lse, weights))
    with torch.cuda.device_of(logits):
        _gradient[count * tiles,](
            logits, *rows, logits.stride(0), width, tiles, _TILE, num_warps=_TILE_WARPS
        )


@triton.jit
def _logsumexp(
    logits, parts, stride, width, share, LANES: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """``share`` columns of a row; grid (T, splits)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * stride
    lanes = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    most = tl.full((LANES,), -_LARGEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    stop = tl.minimum(split * share + share, width)
    for start in range(split * share, stop, LANES * EACH):
        column = start + lanes
        x = tl.load(logits + column, column < stop, float("-inf")).to(tl.float32)
        higher = tl.minimum(tl.maximum(most, tl.max(x, 1)), _LARGEST)
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        most = higher
    top = tl.max(most, 0)
    whole = tl.sum(total * tl.exp(most - top), 0)
    tl.store(parts + row * tl.num_programs(1) + split, tl.log(whole) + top)


@triton.jit
def _gradient(logits, labels, lse, weights, stride, width, tiles, TILE: tl.constexpr):
    """A tile of a row; one for each of the grid's programs."""
    number = tl.program_id(0)
    row = (number // tiles).to(tl.int64)
    start = number % tiles * TILE
    lane = tl.arange(0, TILE)
    column = start + lane
    at = logits + row * stride + column
    weight = tl.load(weights + row)
    read = tl.where(weight == 0, 0, width)
    x = tl.load(at, column < read, 0.0).to(tl.float32)
    hit = lane == tl.load(labels + row) - start
    gradient = weight * (tl.exp(x - tl.load(lse + row)) - hit.to(tl.float32))
    tl.store(at, tl.where(weight == 0, 0.0, gradient).to(logits.dtype.element_ty), column < width)
