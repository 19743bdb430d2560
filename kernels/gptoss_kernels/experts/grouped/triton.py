"""Both functions and their gradients on the GPU by Triton: rows are read once and written once.

A program has some columns of a tile (``tiles.py``), for which it reads the bias once, and goes
through the tile's rows a few at a time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from gptoss_kernels.experts.grouped.tiles import most_tiles, summed, tile_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_kernels.experts import Activation


class Cut(NamedTuple):
    """How programs cut their work; sizes are powers of two.

    Attributes:
        rows: of a tile.
        step: rows that a program takes at a time.
        columns: of a program.
        warps: of a program.
        stages: steps on their way from memory at a time.

    """

    rows: int
    step: int
    columns: int
    warps: int
    stages: int


# The fastest of some forty on an H100, for 16,384 rows of 2880.
_GATED, _GATED_BACK = Cut(32, 8, 256, 4, 3), Cut(64, 2, 1024, 4, 3)
_WEIGHED, _WEIGHED_BACK = Cut(32, 8, 256, 4, 3), Cut(128, 2, 1024, 4, 3)
_NO_LIMIT = float("inf")


def gated(gate_up: Tensor, bias: Tensor | None, counts: Tensor, how: Activation) -> Tensor:
    """As ``gptoss_kernels.experts.gated``, which has checked the arguments."""
    made = gate_up.new_empty((len(gate_up), gate_up.shape[1] // 2))
    _launch(_gated, _GATED, gate_up, bias, counts, made, made.shape[1], *_numbers(how))
    return made


def gated_back(
    gradient: Tensor, gate_up: Tensor, bias: Tensor | None, counts: Tensor, how: Activation
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``gate_up`` and ``bias`` from that of the result, ``[T, I]``."""
    found, parts = torch.empty_like(gate_up), _parts(_GATED_BACK, gate_up, bias, counts)
    tensors = gradient, found, gate_up if parts is None else parts
    _launch(
        _gated_back, _GATED_BACK, gate_up, bias, counts, *tensors, gradient.shape[1], *_numbers(how)
    )
    return found, _summed(_GATED_BACK, parts, bias, counts)


def weighed(y: Tensor, bias: Tensor | None, counts: Tensor, shares: Tensor) -> Tensor:
    """As ``gptoss_kernels.experts.weighed``, which has checked the arguments."""
    made = torch.empty_like(y)
    _launch(_weighed, _WEIGHED, y, bias, counts, shares.contiguous(), made, y.shape[1])
    return made


def weighed_back(
    gradient: Tensor, y: Tensor, bias: Tensor | None, counts: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of ``y``, ``bias`` and ``shares`` from that of the result, ``[T, H]``."""
    count, width = y.shape
    found, parts = torch.empty_like(y), _parts(_WEIGHED_BACK, y, bias, counts)
    blocks = triton.cdiv(width, _WEIGHED_BACK.columns)
    of_shares = torch.empty((blocks, count), dtype=torch.float32, device=y.device)
    tensors = shares.contiguous(), gradient, found, y if parts is None else parts, of_shares
    _launch(_weighed_back, _WEIGHED_BACK, y, bias, counts, *tensors, width)
    return found, _summed(_WEIGHED_BACK, parts, bias, counts), of_shares.sum(0).to(shares.dtype)


def _numbers(how: Activation) -> tuple[float, float, float]:
    return how.alpha, _NO_LIMIT if how.limit is None else how.limit, how.offset


def _launch(
    kernel: Any, cut: Cut, rows: Tensor, bias: Tensor | None, counts: Tensor, *arguments: Any
) -> None:
    """Run a kernel on rows; ``width``, the columns to share out, is the first int of the arguments."""
    width = next(x for x in arguments if isinstance(x, int))
    experts, blocks = len(counts), triton.cdiv(width, cut.columns)
    with torch.cuda.device_of(rows):
        kernel[most_tiles(len(rows), experts, cut.rows) * blocks,](
            rows, rows if bias is None else bias.contiguous(), counts.contiguous(), len(rows),
            *arguments, blocks, bias is not None, experts, triton.next_power_of_2(experts),
            cut.rows, cut.step, cut.columns, cut.stages, num_warps=cut.warps,
        )  # fmt: skip


def _parts(cut: Cut, rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor | None:
    """Room for the sums of tiles, if there is a bias."""
    if bias is None:
        return None
    shape = most_tiles(len(rows), len(counts), cut.rows), rows.shape[1]
    return torch.empty(shape, dtype=torch.float32, device=rows.device)


def _summed(cut: Cut, parts: Tensor | None, bias: Tensor | None, counts: Tensor) -> Tensor | None:
    if parts is None or bias is None:
        return None
    with torch.cuda.device_of(parts):
        return summed(parts, bias, counts.contiguous(), cut.rows)


# --- kernels; one for each of the grid's programs ----------------------------------------------------


@triton.jit
def _clamped(gate, up, limit):
    """NaN stays NaN."""
    gate = tl.minimum(gate, limit, tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, tl.PropagateNan.ALL)
    return gate, tl.maximum(up, -limit, tl.PropagateNan.ALL)


@triton.jit
def _gated(
    gate_up, bias, counts, count, made, width, alpha, limit, offset, blocks,
    BIAS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(counts, count, tl.program_id(0) // blocks, E, WIDE, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if BIAS:
        more = bias + expert * 2 * width + column
        gate_bias = tl.load(more, inside, 0.0).to(tl.float32)[None, :]
        up_bias = tl.load(more + width, inside, 0.0).to(tl.float32)[None, :]
    for start in tl.range(first, end, STEP, num_stages=STAGES):
        row = start + tl.arange(0, STEP).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        at = gate_up + row[:, None] * 2 * width + column[None, :]
        gate = tl.load(at, mask, 0.0).to(tl.float32)
        up = tl.load(at + width, mask, 0.0).to(tl.float32)
        if BIAS:
            gate, up = gate + gate_bias, up + up_bias
        gate, up = _clamped(gate, up, limit)
        value = gate * tl.sigmoid(alpha * gate) * (up + offset)
        to = made + row[:, None] * width + column[None, :]
        tl.store(to, value.to(made.dtype.element_ty), mask)


@triton.jit
def _gated_back(
    gate_up, bias, counts, count, gradient, found, parts, width, alpha, limit, offset, blocks,
    BIAS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) // blocks
    expert, first, end = tile_of(counts, count, number, E, WIDE, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if BIAS:
        more = bias + expert * 2 * width + column
        gate_bias = tl.load(more, inside, 0.0).to(tl.float32)[None, :]
        up_bias = tl.load(more + width, inside, 0.0).to(tl.float32)[None, :]
        gate_sum = tl.zeros((COLUMNS,), tl.float32)
        up_sum = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(first, end, STEP, num_stages=STAGES):
        row = start + tl.arange(0, STEP).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        at = row[:, None] * 2 * width + column[None, :]
        gate = tl.load(gate_up + at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_up + at + width, mask, 0.0).to(tl.float32)
        late = tl.load(gradient + row[:, None] * width + column[None, :], mask, 0.0).to(tl.float32)
        if BIAS:
            gate, up = gate + gate_bias, up + up_bias
        low_gate, low_up = _clamped(gate, up, limit)
        sigmoid = tl.sigmoid(alpha * low_gate)
        swish = low_gate * sigmoid
        slope = sigmoid + alpha * swish * (1 - sigmoid)
        for_gate = tl.where(gate <= limit, late * (low_up + offset) * slope, 0.0)
        for_up = tl.where((up <= limit) & (up >= -limit), late * swish, 0.0)
        tl.store(found + at, for_gate.to(found.dtype.element_ty), mask)
        tl.store(found + at + width, for_up.to(found.dtype.element_ty), mask)
        if BIAS:
            gate_sum += tl.sum(for_gate, 0)
            up_sum += tl.sum(for_up, 0)
    if BIAS:
        to = parts + number.to(tl.int64) * 2 * width + column
        tl.store(to, gate_sum, inside)
        tl.store(to + width, up_sum, inside)


@triton.jit
def _weighed(
    y, bias, counts, count, shares, made, width, blocks, BIAS: tl.constexpr, E: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(counts, count, tl.program_id(0) // blocks, E, WIDE, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if BIAS:
        more = tl.load(bias + expert * width + column, inside, 0.0).to(tl.float32)[None, :]
    for start in tl.range(first, end, STEP, num_stages=STAGES):
        row = start + tl.arange(0, STEP).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        value = tl.load(y + at, mask, 0.0).to(tl.float32)
        if BIAS:
            value += more
        value *= tl.load(shares + row, row < end, 0.0).to(tl.float32)[:, None]
        tl.store(made + at, value.to(made.dtype.element_ty), mask)


@triton.jit
def _weighed_back(
    y, bias, counts, count, shares, gradient, found, parts, of_shares, width, blocks,
    BIAS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = tile_of(counts, count, number, E, WIDE, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if BIAS:
        more = tl.load(bias + expert * width + column, inside, 0.0).to(tl.float32)[None, :]
        total = tl.zeros((COLUMNS,), tl.float32)
    of_shares += block.to(tl.int64) * count
    for start in tl.range(first, end, STEP, num_stages=STAGES):
        row = start + tl.arange(0, STEP).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        value = tl.load(y + at, mask, 0.0).to(tl.float32)
        late = tl.load(gradient + at, mask, 0.0).to(tl.float32)
        if BIAS:
            value += more
        tl.store(of_shares + row, tl.sum(late * value, 1), row < end)
        late *= tl.load(shares + row, row < end, 0.0).to(tl.float32)[:, None]
        tl.store(found + at, late.to(found.dtype.element_ty), mask)
        if BIAS:
            total += tl.sum(late, 0)
    if BIAS:
        tl.store(parts + number.to(tl.int64) * width + column, total, inside)
