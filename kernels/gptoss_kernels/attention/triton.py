"""Attention on the GPU by Triton: one kernel for many queries, another for one.

Scores are never in memory: a program keeps, for each of its rows, the largest logit so far, the
sum of weights relative to it and the weighted sum of values, and goes through the keys tile by
tile (arXiv 2307.08691, section 3.1). A row is a query of one head; the heads of a group are rows
of the same program, as they read the same keys. Logits are in units of log 2, for ``exp2``.

With one query per sequence there are too few rows to fill a GPU. So programs share the keys, and
another kernel puts together what each has found.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


class Tiles(NamedTuple):
    """How a program cuts its work; sizes are powers of two, of 16 at least.

    Attributes:
        rows: queries times heads of a group. With one query, the least; it grows with the heads.
        keys: taken at a time.
        warps: of a program.
        stages: tiles of keys on their way from memory at a time, plus one.

    """

    rows: int
    keys: int
    warps: int
    stages: int


# By bytes of a number.
_PREFILL = {2: Tiles(128, 64, 8, 3), 4: Tiles(64, 32, 8, 2)}  # with 4 warps, registers spill
_DECODE = {2: Tiles(16, 64, 4, 3), 4: Tiles(16, 32, 4, 2)}
_SHARE = 128  # keys that are worth a program of their own
_MOST_SPLITS = 64  # the combining program holds all of them
_WIDEST = 128  # channels

_LOG2_E = 1.4426950408889634
_LOG2E = tl.constexpr(_LOG2_E)
# Below any logit, and yet finite: the difference of two is no NaN where nothing has been seen.
_FLOOR = tl.constexpr(-3.0e38)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    offset: Tensor,
    begin: Tensor | None,
    window: int | None,
    tiles: Tiles | None = None,
    splits: int | None = None,
) -> Tensor:
    """As ``gptoss_kernels.attention.attend``, which has checked the arguments.

    ``tiles`` and ``splits`` (programs that share the keys of a query, if there is one only)
    change the speed and the last bits.
    """
    b, s, n, d = query.shape
    t, g = key.shape[1:3]
    if d > _WIDEST:
        raise ValueError(f"the attention backend triton takes {_WIDEST} channels at most, not {d}")
    out = torch.empty((b, s, n, d), dtype=query.dtype, device=query.device)
    tensors = (
        query,
        key,
        value,
        offset if sinks is None else sinks.contiguous(),
        offset.contiguous(),
        offset if begin is None else begin.contiguous(),
        out,
    )
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    numbers = (t, 0 if window is None else window, scale * _LOG2_E)
    r, wide = n // g, max(16, triton.next_power_of_2(d))
    flags = (sinks is not None, begin is not None, window is not None, _multiplies_long(query))
    with torch.cuda.device_of(query):
        if s > 1:
            cut = tiles or _PREFILL[query.itemsize]
            grid = (g, triton.cdiv(s * r, cut.rows), b)
            _prefill[grid](
                *tensors, *strides, *numbers, s, r, d, wide, cut.rows, cut.keys, *flags,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
            return out
        cut = tiles or _DECODE[query.itemsize]
        rows = max(cut.rows, triton.next_power_of_2(r))
        splits = splits or _splits(query.device, b * g, min(t, window or t))
        found = sums = offset  # nothing to hand on
        if splits > 1:
            found = torch.empty((b, n, splits, 2), dtype=torch.float32, device=query.device)
            sums = torch.empty((b, n, splits, d), dtype=torch.float32, device=query.device)
        _decode[splits, g, b](
            *tensors, found, sums, *strides, *numbers, r, d, wide, rows, cut.keys, splits > 1,
            *flags, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if splits > 1:
            all_splits = triton.next_power_of_2(splits)
            _combine[n, b](
                found, sums, tensors[3], out, splits, d, wide, all_splits, flags[0], num_warps=4
            )
    return out


def _multiplies_long(query: Tensor) -> bool:
    """Whether to multiply as float32: Triton's interpreter takes bfloat16 for integers."""
    return query.dtype == torch.float32 or not isinstance(_prefill, triton.JITFunction)


def _splits(device: torch.device, programs: int, span: int) -> int:
    """How many programs share ``span`` keys at most, to have two for each multiprocessor.

    How many keys there are is known on the GPU only, and may change under a CUDA graph.
    """
    processors = 1  # of the interpreter
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min((2 * processors + programs - 1) // programs, span // _SHARE, _MOST_SPLITS))


# --- parts of the kernels --------------------------------------------------------------------------


@triton.jit
def _loaded(at, there, D: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """Rows that start at ``at``, ``[..., WIDE]``; zeros for those that are not there."""
    channel = tl.arange(0, WIDE)[None, :]
    if MASKED or D != WIDE:
        rows = tl.load(at[:, None] + channel, there[:, None] & (channel < D), 0.0)
    else:
        rows = tl.load(at[:, None] + channel)
    return rows


@triton.jit
def _product(a, b, plus, LONG: tl.constexpr):
    """``a @ b + plus``, float32."""
    if LONG:
        made = tl.dot(a.to(tl.float32), b.to(tl.float32), plus, input_precision="ieee")
    else:
        made = tl.dot(a, b, plus)
    return made


@triton.jit
def _started(sinks, head, there, SINKS: tl.constexpr):
    """The largest logit and the sum of weights with no key seen: those of the sink. ``[ROWS]``."""
    most = tl.full(there.shape, _FLOOR, tl.float32)
    total = tl.zeros(there.shape, tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, there, 0.0).to(tl.float32) * _LOG2E
        most = tl.maximum(sink, _FLOOR)
        total = tl.exp2(sink - most)
    return most, total


@triton.jit
def _sight(offset, begin, b, first, last, t, window, BEGINS: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys the queries ``first`` to ``last`` of a sequence see.

    Whatever is in ``offset`` and ``begin``, these are keys of the cache.

    Returns:
        The key where query 0 sits, the first key of the first query, the end of the last one's.

    """
    place = tl.load(offset + b).to(tl.int32)
    low = tl.maximum(tl.load(begin + b).to(tl.int32), 0) if BEGINS else place * 0
    if WINDOWED:
        low = tl.maximum(low, place + first - window + 1)
    return place, low, tl.minimum(place + last + 1, t)


@triton.jit
def _take(
    sums, most, total, q, key, value, k_row, v_row, at, window, scale, start, stop, end,
    D: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, LONG: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the keys ``start`` to ``stop``, tile by tile; rows from ``end`` on are not read.

    ``sums`` (values times weights, ``[ROWS, WIDE]``), ``most`` (the largest logit, ``[ROWS]``) and
    ``total`` (of the weights, likewise) are float32, and returned as they are then. ``key`` and
    ``value`` are where row 0 is, ``at`` is the last key that a row sees. Not ``MASKED``: all rows
    see all keys.
    """
    lane = tl.arange(0, KEYS)
    wide = lane.to(tl.int64)
    for tile in range(start, stop, KEYS):
        of = tile + lane
        there = of < end
        row = tl.cast(tile, tl.int64)
        k = _loaded(key + row * k_row + wide * k_row, there, D, WIDE, MASKED)
        zeros = tl.zeros([q.shape[0], KEYS], tl.float32)
        logits = _product(q, tl.trans(k), zeros, LONG)
        if MASKED:
            seen = there[None, :] & (of[None, :] <= at[:, None])
            if WINDOWED:
                seen = seen & (of[None, :] > at[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weights, 1)
        v = _loaded(value + row * v_row + wide * v_row, there, D, WIDE, MASKED)
        sums = _product(weights.to(v.dtype), v, sums * fade[:, None], LONG)
        most = higher
    return sums, most, total


@triton.jit
def _store(out, row, there, sums, total, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows ``row`` (int64) of the result; zeros where nothing was seen."""
    made = sums / tl.where(total == 0, 1.0, total)[:, None]
    channel = tl.arange(0, WIDE)[None, :]
    mask = there[:, None] & (channel < D)
    tl.store(out + row[:, None] * D + channel, made.to(out.dtype.element_ty), mask)


# --- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _prefill(
    query, key, value, sinks, offset, begin, out,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    t, window, scale, s, R: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    SINKS: tl.constexpr, BEGINS: tl.constexpr, WINDOWED: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A tile of rows, those of a query next to each other; grid (g, tiles, b).

    Tiles that see most come first, as the last to finish should have little to do. Masks are for
    the tiles of keys at the ends: most of the work is between.
    """
    g, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    top = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = top + tl.arange(0, ROWS)
    i, head = rows // R, g * R + rows % R
    there = i < s
    rows_at = query + b * q_batch + i.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q = _loaded(rows_at, there, D, WIDE, True)
    first, last = top // R, tl.minimum((top + ROWS - 1) // R, s - 1)
    place, low, end = _sight(offset, begin, b, first, last, t, window, BEGINS, WINDOWED)
    at = place + i
    key += b * k_batch + g.to(tl.int64) * k_head
    value += b * v_batch + g.to(tl.int64) * v_head
    most, total = _started(sinks, head, there, SINKS)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    if WINDOWED:  # up to the first key of the last query
        lead = tl.maximum(place + last - window + 1 - low, 0)
        inner = low + (lead + KEYS - 1) // KEYS * KEYS
        sums, most, total = _take(
            sums, most, total, q, key, value, k_row, v_row, at, window, scale,
            low, tl.minimum(inner, end), end, D, WIDE, KEYS, WINDOWED, LONG, True,
        )  # fmt: skip
    else:
        inner = low
    whole = inner + tl.maximum(tl.minimum(place + first + 1, end) - inner, 0) // KEYS * KEYS
    sums, most, total = _take(
        sums, most, total, q, key, value, k_row, v_row, at, window, scale,
        inner, whole, end, D, WIDE, KEYS, WINDOWED, LONG, False,
    )  # fmt: skip
    sums, most, total = _take(
        sums, most, total, q, key, value, k_row, v_row, at, window, scale,
        whole, end, end, D, WIDE, KEYS, WINDOWED, LONG, True,
    )  # fmt: skip
    _store(out, (b * s + i) * (tl.num_programs(0) * R) + head, there, sums, total, D, WIDE)


@triton.jit
def _decode(
    query, key, value, sinks, offset, begin, out, found, all_sums,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    t, window, scale, R: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    SINKS: tl.constexpr, BEGINS: tl.constexpr, WINDOWED: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A share of the keys, for the heads of a group; grid (splits, g, b)."""
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    head, there = g * R + rows, rows < R
    q = _loaded(query + b * q_batch + head.to(tl.int64) * q_head, there, D, WIDE, True)
    place, low, end = _sight(offset, begin, b, 0, 0, t, window, BEGINS, WINDOWED)
    splits = tl.num_programs(0)
    share = (tl.maximum(end - low, 0) + splits - 1) // splits
    share = (share + KEYS - 1) // KEYS * KEYS
    start = low + split * share
    stop = tl.minimum(start + share, end)
    key += b * k_batch + g.to(tl.int64) * k_head
    value += b * v_batch + g.to(tl.int64) * v_head
    most, total = _started(sinks, head, there, SINKS and not SPLIT)
    sums, most, total = _take(
        tl.zeros([ROWS, WIDE], tl.float32), most, total, q, key, value, k_row, v_row,
        place + rows * 0, window, scale, start, stop, stop, D, WIDE, KEYS, False, LONG, True,
    )  # fmt: skip
    row = b * (tl.num_programs(1) * R) + head
    if SPLIT:
        row = row * splits + split
        tl.store(found + row * 2, most, there)
        tl.store(found + row * 2 + 1, total, there)
        _store(all_sums, row, there, sums, tl.full(there.shape, 1.0, tl.float32), D, WIDE)
    else:
        _store(out, row, there, sums, total, D, WIDE)


@triton.jit
def _combine(
    found, all_sums, sinks, out, splits, D: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What the shares of the keys give together, with the sink; grid (n, b)."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * tl.num_programs(0) + head
    split = tl.arange(0, SPLITS)
    there = split < splits
    each = row * splits + split
    mosts = tl.load(found + each * 2, there, _FLOOR)
    totals = tl.load(found + each * 2 + 1, there, 0.0)
    sums = _loaded(all_sums + each * D, there, D, WIDE, True)
    most = tl.max(mosts, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        most = tl.maximum(most, sink)
    weights = tl.exp2(mosts - most)
    total = tl.sum(weights * totals, 0)
    if SINKS:
        total += tl.exp2(sink - most)
    made = tl.sum(weights[:, None] * sums, 0) / tl.where(total == 0, 1.0, total)
    channel = tl.arange(0, WIDE)
    tl.store(out + row * D + channel, made.to(out.dtype.element_ty), channel < D)
