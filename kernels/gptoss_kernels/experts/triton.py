"""Two kernels: gate and up with the activation, then down with the sum over a token's experts.

Both are products of matrices with single vectors, as fast as the weights can be read. A program has a
few rows of a matrix and goes along them in steps; it adds up element by element, and sums the columns
only in the end.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_kernels.experts import Activation, Weights

_UP_ROWS, _DOWN_ROWS = 8, 8  # of a program; gate and up are two matrices
_COLUMNS = 512  # at a time
_WARPS = 4
_NO_LIMIT = float("inf")


def mix(
    tokens: Tensor, chosen: Tensor, shares: Tensor, weights: Weights, activation: Activation
) -> Tensor:
    """See ``gptoss_kernels.experts.mix``."""
    count, hidden = tokens.shape
    top, width = chosen.shape[1], weights.fc2.shape[2]
    inner = tokens.new_empty((count * top, width))
    made = torch.empty_like(tokens)
    limit = _NO_LIMIT if activation.limit is None else activation.limit
    numbers = (activation.alpha, limit, activation.offset)
    up = (count * top, triton.cdiv(width, _UP_ROWS))
    _gate_and_up[up](
        tokens,
        chosen,
        weights.fc1,
        weights.bias1,
        inner,
        hidden,
        width,
        *numbers,
        TOP=top,
        BIAS=weights.bias1 is not None,
        ROWS=_UP_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    _down[(count, triton.cdiv(hidden, _DOWN_ROWS))](
        inner,
        chosen,
        shares,
        weights.fc2,
        weights.bias2,
        made,
        hidden,
        width,
        TOP=top,
        BIAS=weights.bias2 is not None,
        ROWS=_DOWN_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    return made


@triton.jit
def _gate_and_up(
    tokens,
    chosen,
    weight,
    bias,
    inner,
    hidden,
    width,
    alpha,
    limit,
    offset,
    TOP: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0)
    expert = tl.load(chosen + pair)  # int64: its weights may lie beyond 2^31 elements
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = rows < width
    gates = weight + expert * (2 * width * hidden) + rows[:, None] * hidden
    ups = gates + width * hidden
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < hidden
        x = tl.load(tokens + (pair // TOP) * hidden + columns, mask=inside, other=0.0)
        both = there[:, None] & inside[None, :]
        g = tl.load(gates + columns[None, :], mask=both, other=0.0)
        u = tl.load(ups + columns[None, :], mask=both, other=0.0)
        gate += g.to(tl.float32) * x.to(tl.float32)[None, :]
        up += u.to(tl.float32) * x.to(tl.float32)[None, :]
    g = tl.sum(gate, 1)
    u = tl.sum(up, 1)
    if BIAS:
        place = bias + expert * (2 * width) + rows
        g += tl.load(place, mask=there, other=0.0).to(tl.float32)
        u += tl.load(place + width, mask=there, other=0.0).to(tl.float32)
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    value = g * tl.sigmoid(alpha * g) * (u + offset)
    tl.store(inner + pair * width + rows, value.to(inner.dtype.element_ty), mask=there)


@triton.jit
def _down(
    inner,
    chosen,
    shares,
    weight,
    bias,
    made,
    hidden,
    width,
    TOP: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = rows < hidden
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    biases = tl.zeros((ROWS,), tl.float32)
    for choice in range(TOP):
        pair = token * TOP + choice
        expert = tl.load(chosen + pair)
        share = tl.load(shares + pair).to(tl.float32)
        base = weight + expert * (hidden * width) + rows[:, None] * width
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < width
            x = tl.load(inner + pair * width + columns, mask=inside, other=0.0)
            w = tl.load(base + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            total += w.to(tl.float32) * (share * x.to(tl.float32))[None, :]
        if BIAS:
            b = tl.load(bias + expert * hidden + rows, mask=there, other=0.0)
            biases += share * b.to(tl.float32)
    value = tl.sum(total, 1) + biases
    tl.store(made + token * hidden + rows, value.to(made.dtype.element_ty), mask=there)
