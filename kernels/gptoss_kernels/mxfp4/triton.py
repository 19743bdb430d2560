"""MXFP4 on the GPU by Triton, about as fast as memory can be copied, in one pass for any layout.

Everything is 32-bit integers that are float32 bits: bfloat16 is their upper half, so the two
precisions share the code, and what is stored never depends on how a device rounds or flushes. A
code times 2**-126 is a float32 whose upper 10 bits are the code itself (code 1 is a subnormal):
that is how codes become numbers here, and how numbers are rounded to codes.

Where K is contiguous, a program takes a run of the blocks in stored order, across rows; for any
other strides, a tile of rows by K, which the compiler turns around in shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BLOCK, LARGEST_SCALE, NAN_BITS, NAN_SCALE, SHIFTED, Rule

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = 4  # int32 words in a block, of 8 codes each

_BLOCK = tl.constexpr(BLOCK)
_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)
_NAN_SCALE = tl.constexpr(NAN_SCALE)
_NAN = tl.constexpr(NAN_BITS << 16)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_UP = tl.constexpr(2.0**126)
_DOWN = tl.constexpr(2.0**-126)
_CODE = tl.constexpr(22)  # where the code of a number times 2**-126 starts
_FARTHEST = tl.constexpr(len(SHIFTED) - 1)
_STICKY = tl.constexpr(12)  # float32 fraction bits that only count as "not zero"


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``; exact."""
    view = _simplest(view)
    packed = (_aligned(blocks).view(torch.int32), scales, view.view(torch.int16))
    experts, outer, inner, width = view.shape
    e, a, b, k = view.stride()
    row = width // 8  # words
    with torch.cuda.device_of(view):
        if k == 1:
            n = 256
            tiles = triton.cdiv(outer * inner * row, n)
            shape = (outer * inner * row, tiles, e, a, b, row, inner, view.is_contiguous())
            _decode_rows[experts * tiles,](*packed, *shape, n, num_warps=8)
        else:
            tall, wide = 64, 16
            grid = (triton.cdiv(outer, tall), triton.cdiv(row, wide), inner * experts)
            shape = (outer, e, a, b, k, row, inner)
            _decode_tiles[_flat(grid)](*packed, *grid[:2], *shape, tall, wide, num_warps=4)


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""
    view = _simplest(view)
    made = _aligned(blocks)
    packed = (made.view(torch.int32), scales, scales if hint is None else hint)
    choice = (table.carry(rule, 23), hint is not None)
    experts, outer, inner, width = view.shape
    row = width // BLOCK  # blocks
    with torch.cuda.device_of(view):
        if _in_pairs(view):
            pairs = view.view(torch.int32)
            n = 64
            tiles = triton.cdiv(outer * inner * row, n)
            shape = (outer * inner * row, tiles, *pairs.stride()[:3], row, inner)
            whole = view.is_contiguous()
            _encode_rows[experts * tiles,](pairs, *packed, *shape, whole, *choice, n, num_warps=2)
        else:
            tall, wide = 64, 2
            grid = (triton.cdiv(outer, tall), triton.cdiv(row, wide), inner * experts)
            shape = (outer, *view.stride(), row, inner)
            bits = view.view(torch.int16 if view.itemsize == 2 else torch.int32)
            tile = (tall, wide)
            _encode_tiles[_flat(grid)](
                bits, *packed, *grid[:2], *shape, *choice, view.itemsize == 4, *tile, num_warps=4
            )
    if made is not blocks:
        blocks.copy_(made)


def _simplest(view: Tensor) -> Tensor:
    """The same rows in the same order, with E the slowest and B one if that can be had."""
    if view.shape[2] == 1 and view.stride(0) < view.stride(1):
        view = view.transpose(0, 2).transpose(1, 2)  # [E, A, 1, K] -> [1, E, A, K]
    if view.stride(1) == view.shape[2] * view.stride(2):
        view = view.flatten(1, 2).unsqueeze(2)
    return view


def _aligned(blocks: Tensor) -> Tensor:
    """Blocks at an address that words can be read from; a copy in the rare case."""
    return blocks.clone() if (blocks.data_ptr() | blocks.storage_offset()) % 4 else blocks


def _in_pairs(view: Tensor) -> bool:
    """Whether two bfloat16 neighbours along K can be read as a word."""
    even = all(step % 2 == 0 for step in (*view.stride()[:3], view.storage_offset()))
    return view.itemsize == 2 and view.stride(3) == 1 and even and view.data_ptr() % 4 == 0


def _flat(grid: tuple[int, int, int]) -> tuple[int]:
    """As one dimension: the others are limited to 65535."""
    return (grid[0] * grid[1] * grid[2],)


# --- numbers ---------------------------------------------------------------------------------------


@triton.jit
def _float(bits: Any) -> Any:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power(scale: Any) -> Any:
    """2**(scale - 127); of 0 that is a subnormal."""
    return _float(tl.where(scale == 0, 0x00400000, scale << 23))


@triton.jit
def _value(words: Any, at: tl.constexpr, factor: Any, keep: Any, nan: Any) -> Any:
    """bfloat16 bits of the codes at a bit of the words.

    Every product is a bfloat16, so the lower half of its bits is zero.
    """
    sign = (words << (28 - at)) & -0x80000000
    small = ((words >> at) & 7) << _CODE
    bits = (_float(small | sign) * _UP * factor).to(tl.int32, bitcast=True)
    return (((bits & keep) | nan) >> 16).to(tl.int16)


@triton.jit
def _values(words: Any, scale: Any) -> Any:
    """Words ``[..., n]`` and scale bytes that belong to them -> bfloat16 bits ``[..., n, 8]``."""
    factor = _power(scale)
    keep = tl.where(scale == _NAN_SCALE, 0, -1)  # a device's own NaN may be another
    nan = tl.where(scale == _NAN_SCALE, _NAN, 0)
    v0 = _value(words, 0, factor, keep, nan)
    v1 = _value(words, 4, factor, keep, nan)
    v2 = _value(words, 8, factor, keep, nan)
    v3 = _value(words, 12, factor, keep, nan)
    v4 = _value(words, 16, factor, keep, nan)
    v5 = _value(words, 20, factor, keep, nan)
    v6 = _value(words, 24, factor, keep, nan)
    v7 = _value(words, 28, factor, keep, nan)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)  # [..., 4s, 2s, 1s]


@triton.jit
def _scaled(magnitude: Any, scale: Any) -> Any:
    """Bits of ``magnitude / 2**(scale - 127) * 2**-126``. Only far below code 1 are bits lost."""
    inverse = _power(-(scale - _LARGEST_SCALE))
    return (_float(magnitude) * inverse * _DOWN).to(tl.int32, bitcast=True)


@triton.jit
def _nearest(scaled: Any, bits: Any) -> Any:
    """Codes, ties to even, with the sign of ``bits``."""
    half = (1 << (_CODE - 1)) - 1
    rounded = (scaled + half + ((scaled >> _CODE) & 1)) >> _CODE
    return tl.minimum(rounded, 7) | ((bits >> 28) & 8)


@triton.jit
def _off_grid(scaled: Any, magnitude: Any) -> Any:
    fraction = scaled & ((1 << _CODE) - 1)
    return (fraction != 0) | ((scaled == 0) & (magnitude != 0))


@triton.jit
def _most(x: Any) -> Any:
    """``[..., 4, 4]`` -> ``[..., 1, 1]``."""
    return tl.max(tl.max(x, -1, keep_dims=True), -2, keep_dims=True)


@triton.jit
def _quantized(
    even: Any, odd: Any, hint: Any, carry: Any, HINTED: tl.constexpr, LONG: tl.constexpr
) -> Any:
    """Float32 bits of a block's even and odd elements -> its words and its scale.

    Args:
        even: ``[..., 4, 4]``: the words of a block, the bytes of a word.
        odd: likewise.
        hint: ``[..., 1, 1]``.
        carry: the rule, as what makes its ``m`` overflow into the exponent.
        HINTED: whether there is a hint.
        LONG: whether fractions are longer than bfloat16's.

    Returns:
        int32 ``[..., 4]`` and ``[..., 1, 1]``.

    """
    low, high = even & _MAGNITUDE, odd & _MAGNITUDE
    if LONG:  # 24 bits do not fit a subnormal, 12 do; the last says "and more", and breaks ties
        rest = (1 << _STICKY) - 1
        low = (low | ((low & rest) + rest)) & ~rest
        high = (high | ((high & rest) + rest)) & ~rest
    largest = _most(tl.maximum(low, high))
    largest = tl.minimum(largest, _INFINITY)
    scale = ((largest + carry) >> 23) - 2
    scale = tl.minimum(tl.maximum(scale, 0), _LARGEST_SCALE)
    if HINTED:
        above = hint - scale
        near = (above >= 1) & (above <= _FARTHEST)  # form.SHIFTED says why no other can be
        wanted = tl.where((hint != _NAN_SCALE) & (near | (largest == 0)), hint, scale)
        # Most programs find nothing to do here, and then the hint costs its reading only.
        if tl.max(wanted ^ scale, None) != 0:
            off = _off_grid(_scaled(low, wanted), low) | _off_grid(_scaled(high, wanted), high)
            scale = tl.where(_most(off.to(tl.int32)) == 0, wanted, scale)
    codes = _nearest(_scaled(low, scale), even) | (_nearest(_scaled(high, scale), odd) << 4)
    codes = tl.where(largest == _INFINITY, 0, codes)
    scale = tl.where(largest == _INFINITY, _NAN_SCALE, scale)
    return tl.sum(codes << (8 * tl.arange(0, 4)), -1), scale


# --- runs of blocks, where K is contiguous ---------------------------------------------------------


@triton.jit
def _run(
    units: Any,
    tiles: Any,
    e_step: Any,
    a_step: Any,
    b_step: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    N: tl.constexpr,
) -> Any:
    """The ``N`` units (words or blocks) of a program.

    Args:
        units: of one expert.
        tiles: programs for one expert.
        e_step: stride of E in the view, and likewise for A and B.
        a_step: see there.
        b_step: see there.
        ROW: units in a row.
        INNER: the size of B.
        WHOLE: whether the view is contiguous.
        SIZE: elements of the view in a unit.
        N: how many.

    Returns:
        their places in stored order and in the view, and which of them exist.

    """
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * N
    unit = start + tl.arange(0, N)
    place = expert * units + unit
    if WHOLE:
        offset = place * SIZE
    else:  # the division by lane is one of 32 bits, by a constant: those by program are cheap
        first = start // ROW
        column = (start - first * ROW).to(tl.int32) + tl.arange(0, N)
        row = first.to(tl.int32) + column // ROW
        offset = expert * e_step + (row // INNER).to(tl.int64) * a_step
        offset += (row % INNER).to(tl.int64) * b_step + (column % ROW) * SIZE
    return place, offset, unit < units


@triton.jit
def _decode_rows(
    blocks: Any,
    scales: Any,
    view: Any,
    units: Any,
    tiles: Any,
    e_step: Any,
    a_step: Any,
    b_step: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """A word to a lane: 4 bytes in, and 16 out, the widest store there is."""
    place, offset, mask = _run(units, tiles, e_step, a_step, b_step, ROW, INNER, WHOLE, 8, N)
    words = tl.load(blocks + place, mask, 0)
    scale = tl.load(scales + place // 4, mask, 0).to(tl.int32)
    values = tl.reshape(_values(words, scale), (N, 8))
    tl.store(view + (offset[:, None] + tl.arange(0, 8)), values, mask[:, None])


@triton.jit
def _encode_rows(
    view: Any,
    blocks: Any,
    scales: Any,
    hint: Any,
    units: Any,
    tiles: Any,
    e_step: Any,
    a_step: Any,
    b_step: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    carry: Any,
    HINTED: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """A view of pairs of bfloat16; 4 pairs to a lane are 16 bytes in, and 4 out."""
    place, offset, mask = _run(units, tiles, e_step, a_step, b_step, ROW, INNER, WHOLE, 16, N)
    at = offset[:, None, None] + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)
    pairs = tl.load(view + at, mask[:, None, None], 0)
    one, there = place[:, None, None], mask[:, None, None]
    wanted = tl.load(hint + one, there, 0).to(tl.int32) if HINTED else 0
    words, scale = _quantized(pairs << 16, pairs & -0x10000, wanted, carry, HINTED, False)
    tl.store(blocks + (place[:, None] * 4 + tl.arange(0, 4)), words, mask[:, None])
    tl.store(scales + one, scale.to(tl.uint8), there)


# --- tiles of rows by K, for any strides -----------------------------------------------------------


@triton.jit
def _tile(
    tiles_a: Any,
    tiles_k: Any,
    outer: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
) -> Any:
    """The tile of a program: neighbours along A run together, as they share pages of memory.

    Args:
        tiles_a: tiles along A.
        tiles_k: tiles along K.
        outer: the size of A.
        ROW: units (words or blocks) in a row.
        INNER: the size of B.
        TALL: the rows of a tile, all of one b.
        WIDE: its units along K.

    Returns:
        e, a ``[TALL]``, b, units along K ``[WIDE]``; places in stored order and which of them
        exist ``[TALL, WIDE]``.

    """
    rest = tl.program_id(0) // tiles_a
    a = (tl.program_id(0) % tiles_a) * TALL + tl.arange(0, TALL)
    unit = (rest % tiles_k) * WIDE + tl.arange(0, WIDE)
    rest = rest // tiles_k
    e, b = (rest // INNER).to(tl.int64), rest % INNER
    row = (e * outer + a) * INNER + b
    mask = (a < outer)[:, None] & (unit < ROW)[None, :]
    return e, a.to(tl.int64), b.to(tl.int64), unit, row[:, None] * ROW + unit[None, :], mask


@triton.jit
def _decode_tiles(
    blocks: Any,
    scales: Any,
    view: Any,
    tiles_a: Any,
    tiles_k: Any,
    outer: Any,
    e_step: Any,
    a_step: Any,
    b_step: Any,
    k_step: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    e, a, b, unit, place, mask = _tile(tiles_a, tiles_k, outer, ROW, INNER, TALL, WIDE)
    words = tl.load(blocks + place, mask, 0)
    scale = tl.load(scales + place // 4, mask, 0).to(tl.int32)
    values = tl.reshape(_values(words, scale), (TALL, WIDE * 8))
    k = (tl.program_id(0) // tiles_a % tiles_k) * (WIDE * 8) + tl.arange(0, WIDE * 8)
    at = (e * e_step + b * b_step + a * a_step)[:, None] + (k.to(tl.int64) * k_step)[None, :]
    tl.store(view + at, values, (a < outer)[:, None] & (k < ROW * 8)[None, :])


@triton.jit
def _encode_tiles(
    view: Any,
    blocks: Any,
    scales: Any,
    hint: Any,
    tiles_a: Any,
    tiles_k: Any,
    outer: Any,
    e_step: Any,
    a_step: Any,
    b_step: Any,
    k_step: Any,
    ROW: tl.constexpr,
    INNER: tl.constexpr,
    carry: Any,
    HINTED: tl.constexpr,
    LONG: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    e, a, b, unit, place, mask = _tile(tiles_a, tiles_k, outer, ROW, INNER, TALL, WIDE)
    k = unit[:, None, None] * 32 + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 4) * 2
    at = (e * e_step + b * b_step + a * a_step)[:, None, None, None] + k.to(tl.int64) * k_step
    one, there = place[:, :, None, None], mask[:, :, None, None]
    even = tl.load(view + at, there, 0).to(tl.int32)
    odd = tl.load(view + (at + k_step), there, 0).to(tl.int32)
    if not LONG:
        even, odd = even << 16, odd << 16
    wanted = tl.load(hint + one, there, 0).to(tl.int32) if HINTED else 0
    words, scale = _quantized(even, odd, wanted, carry, HINTED, LONG)
    tl.store(blocks + (place[:, :, None] * 4 + tl.arange(0, 4)), words, mask[:, :, None])
    tl.store(scales + one, scale.to(tl.uint8), there)
