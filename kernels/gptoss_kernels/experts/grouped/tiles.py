"""How programs share rows that are sorted by expert: tiles of one expert's rows each.

How many rows an expert has is known on the GPU only. So there are as many programs as tiles could be
needed at most, ``T / ROWS + E``, and each finds out which tile is its own, if any is. Sums over an
expert's rows are made tile by tile first, then over tiles: always in the same order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_STEP, _COLUMNS, _WARPS = 8, 128, 4  # of a program that sums tiles: tiles at a time, columns


def most_tiles(rows: int, experts: int, size: int) -> int:
    """How many tiles of that size there are at most."""
    return -(-rows // size) + experts


@triton.jit
def tile_of(counts, count, number, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """The ``number``-th tile's expert (int64), its first row and its end.

    There is no row between these two if there is no such tile. Whatever is in ``counts``, there are
    no rows beyond ``count``.
    """
    expert = tl.arange(0, WIDE)
    own = tl.load(counts + expert, expert < E, 0).to(tl.int32)
    tiles = (own + ROWS - 1) // ROWS
    before = number - (tl.cumsum(tiles, 0) - tiles)  # tiles of the expert that come before
    mine = (before >= 0) & (before < tiles)
    start = tl.cumsum(own, 0) - own + before * ROWS
    rows = tl.minimum(own - before * ROWS, ROWS)
    first = tl.sum(tl.where(mine, start, 0), 0)
    end = tl.minimum(first + tl.sum(tl.where(mine, rows, 0), 0), count)
    return tl.sum(tl.where(mine, expert, 0), 0).to(tl.int64), first, end


def summed(parts: Tensor, bias: Tensor, counts: Tensor, size: int) -> Tensor:
    """Sums of each expert's tiles, ``[E, N]`` in the bias' dtype.

    Args:
        parts: float32 ``[tiles, N]``; what is past the last tile is not read.
        bias: ``[E, N]``.
        counts: int64 ``[E]``.
        size: rows of a tile.

    """
    made = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    experts, width = bias.shape
    blocks = triton.cdiv(width, _COLUMNS)
    _sum[experts * blocks,](
        parts, counts, len(parts), made, width, blocks, experts, triton.next_power_of_2(experts),
        size, _STEP, _COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return made


@triton.jit
def _sum(
    parts, counts, count, made, width, blocks, E: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns of an expert; one for each of the grid's programs."""
    mine = tl.program_id(0) // blocks
    expert = tl.arange(0, WIDE)
    tiles = (tl.load(counts + expert, expert < E, 0).to(tl.int32) + ROWS - 1) // ROWS
    first = tl.sum(tl.where(expert < mine, tiles, 0), 0)
    end = tl.minimum(first + tl.sum(tl.where(expert == mine, tiles, 0), 0), count)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(first, end, STEP):
        tile = start + tl.arange(0, STEP)
        at = parts + tile.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(at, (tile < end)[:, None] & inside[None, :], 0.0)
    to = made + mine.to(tl.int64) * width + column
    tl.store(to, tl.sum(total, 0).to(made.dtype.element_ty), inside)
