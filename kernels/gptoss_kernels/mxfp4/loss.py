"""What encoding to MXFP4 lost: decoded again and compared, chunk by chunk, in plain torch or by numba."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BLOCK, BYTES
from gptoss_kernels.mxfp4.threads import contiguous, scratch, spread
from gptoss_kernels.mxfp4.views import chunks, four_dims

Compare = Callable[[Tensor, Tensor, Tensor], tuple[int, float, float, float, int]]
_CHUNK = {"cpu": 1 << 13, "cuda": 1 << 22}  # blocks at a time; on the CPU results stay in the cache
_IN_ONE_PASS = 1 << 16  # where there are none, and what is compared is not copied


class MXFP4Loss(NamedTuple):
    """Counts and sums. Values that were NaN or infinite are counted and left out of the others;
    a finite value that became NaN, as one beside a NaN does, is lost: its error is its size.

    Attributes:
        blocks: blocks of 32.
        kept: blocks that decode to exactly what they were made from, signs of zeros included.
        largest: the largest absolute error.
        squares: sum of the squared errors.
        power: sum of the squared values.
        elements: 32 times the blocks.
        nonfinite: values that were NaN or infinite.

    """

    blocks: int
    kept: int
    largest: float
    squares: float
    power: float
    elements: int
    nonfinite: int


def loss(tensor: Tensor, blocks: Tensor, scales: Tensor) -> MXFP4Loss:
    """Compare ``tensor`` (bfloat16, float16 or float32 ``[..., K]`` on the CPU) with what its
    blocks and scales, in the same order, decode to. Sums are in float32 over a chunk, in float64
    over the chunks. No encoder judges itself: decoding has none of their code.
    """
    view = four_dims(tensor)
    places = (view.shape[0], view.shape[1] * view.shape[2], view.shape[3] // BLOCK)
    blocks, scales = blocks.view(*places, BYTES), scales.view(places)

    in_one_pass = _in_one_pass(tensor)

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> tuple[int, float, float, float, int]:
        part, rows = chunk
        if in_one_pass:
            return in_one_pass(rows, blocks[part], scales[part])
        back = scratch(4, rows.shape, torch.bfloat16, rows.device)
        table.decode(blocks[part][None], scales[part][None], back.view(1, -1, 1, view.shape[3]))
        return _compare(contiguous(rows).view(-1, BLOCK), back.view(-1, BLOCK))

    in_place = in_one_pass and view.stride(-1) == 1
    most = _IN_ONE_PASS if in_place else _CHUNK[view.device.type]
    found = zip(*spread(work, list(chunks(view, most))), strict=True)
    kept, largest, squares, power, nonfinite = found
    count = scales.numel()
    sums = sum(squares), sum(power)
    return MXFP4Loss(count, sum(kept), max(largest), *sums, count * BLOCK, sum(nonfinite))


def _in_one_pass(tensor: Tensor) -> Compare | None:
    """By numba, for whom it serves at all; loaded for this alone it would cost more than it saves."""
    if tensor.device.type != "cpu" or tensor.dtype == torch.float16:
        return None
    if "gptoss_kernels.mxfp4.numba" not in sys.modules:
        return None
    from gptoss_kernels.mxfp4.numba_loss import compare

    return compare


def _compare(value: Tensor, back: Tensor) -> tuple[int, float, float, float, int]:
    """How many blocks ``[N, 32]`` are equal; largest error, sums of squared errors and values, how
    many values are not finite.
    """
    wide = scratch(5, value.shape, torch.float32, value.device).copy_(value)
    power = float(torch.dot(wide.view(-1), wide.view(-1)))
    half = value.dtype == back.dtype
    left, right = (value, back) if half else (wide, scratch(6, *_like(wide)).copy_(back))
    bits = scratch(7, *_like(left.view(torch.int64)))
    torch.bitwise_xor(left.view(torch.int64), right.view(torch.int64), out=bits)
    low, high = bits.aminmax()  # "==" is far slower in torch
    if not (low or high) and _held(power):
        return len(value), 0.0, 0.0, power, 0
    kept = int(((bits.amax(1) == 0) & (bits.amin(1) == 0)).sum())
    if _held(power):
        error = torch.sub(back, wide, out=scratch(6, *_like(wide)))
        least, most = map(float, error.aminmax())
        squares = float(error.square_().sum())
        if kept == len(value) or _held(squares):
            return kept, max(-least, most), squares, power, 0
    finite = wide.isfinite()
    again = torch.where(finite & back.isfinite(), back, 0).double()
    wide = torch.where(finite, wide, 0).double()
    error = again - wide
    largest, squares = float(error.abs().max()), float(error.square().sum())
    return kept, largest, squares, float(wide.square().sum()), int((~finite).sum())


def _held(squares: float) -> bool:
    """Whether float32 held a sum of squares: none of weight was too small, and none too large."""
    return 1e-30 < squares < math.inf


def _like(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
