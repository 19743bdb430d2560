"""MXFP4 on the GPU by Triton, about as fast as memory can be copied, in one pass for any layout.

Everything is 32-bit integers that are float32 bits: bfloat16 is their upper half, so the two
precisions share the code, and what is stored never depends on how a device rounds or flushes. A
code times 2**-126 is a float32 whose upper 10 bits are the code itself (code 1 is a subnormal):
that is how codes become numbers here, and how numbers are rounded to codes.

Where K is contiguous, a program takes a run of the blocks in stored order, across rows; for any
other strides, a tile of rows by K, which the compiler turns around in shared memory.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BIAS, BLOCK, LARGEST_SCALE, NAN_BITS, NAN_SCALE, SHIFTED, Rule

if TYPE_CHECKING:
    from torch import Tensor

# By layout: rows of a tile, words (or blocks) along K, warps. The fastest of some dozen on an H100.
_DECODE_SHARE = {"whole": (1, 512, 8), "rows": (1, 256, 4), "tiles": (64, 16, 4)}
_ENCODE_SHARE = {"whole": (1, 128, 2), "rows": (1, 64, 1), "tiles": (64, 2, 2)}
_HINTED_SHARE = {"whole": (1, 32, 1), "rows": (1, 32, 1), "tiles": (64, 2, 2)}

_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)
_NAN_SCALE = tl.constexpr(NAN_SCALE)
_TWICE_BIAS = tl.constexpr(2 * BIAS)
_LARGEST = tl.constexpr(0x7F400000)  # form.LARGEST
_NAN = tl.constexpr(NAN_BITS << 16)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_UP = tl.constexpr(2.0**126)
_DOWN = tl.constexpr(2.0**-126)
_CODE = tl.constexpr(22)  # where the code of a number times 2**-126 starts
_FARTHEST = tl.constexpr(len(SHIFTED) - 1)
_FRACTION = tl.constexpr((1 << 22) - 1)  # what is below it
_interpreting = threading.Lock()  # the interpreter changes triton.language while it runs a kernel
_HALF = tl.constexpr((1 << 21) - 1)  # added to that: a half less the least
_REST = tl.constexpr((1 << 12) - 1)  # fraction bits of a float32 that count as "and more" only


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``; exact."""
    view = _simplest(view)
    layout = _layout(view)
    *share, warps = _DECODE_SHARE[layout]
    programs, shape = _shape(view, 8, layout, *share)
    packed = _aligned(blocks).view(torch.int32), scales
    _launch(_decode, view, programs, *packed, view.view(torch.int16), *shape, num_warps=warps)


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""
    view = _simplest(view)
    layout, pairs, long = _layout(view), _has_pairs(view), view.itemsize == 4
    *share, warps = (_ENCODE_SHARE if hint is None else _HINTED_SHARE)[layout]
    bits = view.view(torch.int32 if pairs or long else torch.int16)
    programs, shape = _shape(bits, BLOCK // 2 if pairs else BLOCK, layout, *share)
    made = _aligned(blocks)
    data = bits, table.carry(rule, 23), scales if hint is None else hint
    flags = hint is not None, hint is None or rule == "floor", pairs, long
    parts = made.view(torch.int32), scales
    _launch(_encode, view, programs, *data, *parts, *shape, *flags, num_warps=warps)
    if made is not blocks:
        blocks.copy_(made)


def _launch(kernel: Any, view: Tensor, programs: int, *arguments: Any, num_warps: int) -> None:
    """Run a kernel where the view is."""
    compiled = isinstance(kernel, triton.JITFunction)
    with torch.cuda.device_of(view), contextlib.nullcontext() if compiled else _interpreting:
        kernel[programs,](*arguments, num_warps=num_warps)


def _simplest(view: Tensor) -> Tensor:
    """The same rows in the same order, with E the slowest and B one if that can be had."""
    if view.shape[2] == 1 < view.shape[0] and view.stride(0) < view.stride(1):
        view = view.transpose(0, 2).transpose(1, 2)  # [E, A, 1, K] -> [1, E, A, K]
    if view.stride(1) == view.shape[2] * view.stride(2):
        view = view.flatten(1, 2).unsqueeze(2)
    return view


def _layout(view: Tensor) -> str:
    """How programs share the work.

    Returns:
        "whole": each takes a run of blocks in stored order, all of the view being in that order;
        "rows": likewise, but rows are where the strides say;
        "tiles": each takes a tile of rows by K, which the compiler turns around if it has to.

    """
    if view.is_contiguous():
        return "whole"
    return "rows" if view.stride(3) == 1 else "tiles"


def _shape(
    view: Tensor, size: int, layout: str, tall: int, wide: int
) -> tuple[int, tuple[int | str, ...]]:
    """The number of programs, and the arguments of ``_units`` in the kernels' order."""
    experts, outer, inner, width = view.shape
    row = width // size
    if layout == "tiles":
        programs = experts * inner * triton.cdiv(outer, tall) * triton.cdiv(row, wide)
    else:
        programs = experts * triton.cdiv(outer * inner * row, wide)
    return programs, (outer, *view.stride(), row, inner, layout, tall, wide)


def _aligned(blocks: Tensor) -> Tensor:
    """Blocks at an address that words can be read from; a copy in the rare case."""
    odd = blocks.data_ptr() % 4 or blocks.storage_offset() % 4
    return blocks.clone() if odd else blocks


def _has_pairs(view: Tensor) -> bool:
    """Whether two bfloat16 neighbours along K can be read as a word."""
    even = all(step % 2 == 0 for step in (*view.stride()[:3], view.storage_offset()))
    return view.itemsize == 2 and view.stride(3) == 1 and even and view.data_ptr() % 4 == 0


# --- numbers ---------------------------------------------------------------------------------------


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power(scale):
    """2**(scale - 127); of 0 that is a subnormal."""
    return _float(tl.where(scale == 0, 0x00400000, scale << 23))


@triton.jit
def _value(words, at: tl.constexpr, factor, keep, nan):
    """bfloat16 bits of the codes at a bit of the words.

    Every product is a bfloat16, so the lower half of its bits is zero.
    """
    sign = (words << (28 - at)) & -0x80000000
    small = ((words >> at) & 7) << _CODE
    bits = (_float(small | sign) * _UP * factor).to(tl.int32, bitcast=True)
    return (((bits & keep) | nan) >> 16).to(tl.int16)


@triton.jit
def _values(words, scale):
    """Words ``[..., n]`` and scale bytes that belong to them -> bfloat16 bits ``[..., n, 2, 2, 2]``."""
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
def _scaled(magnitude, scale):
    """Bits of ``magnitude / 2**(scale - 127) * 2**-126``. Only far below code 1 are bits lost."""
    inverse = _power(-(scale - _TWICE_BIAS))
    return (_float(magnitude) * inverse * _DOWN).to(tl.int32, bitcast=True)


@triton.jit
def _nearest(scaled, bits, CUTS: tl.constexpr):
    """Codes, ties to even, with the sign of ``bits``."""
    code = (scaled + _HALF + ((scaled >> _CODE) & 1)) >> _CODE
    if CUTS:
        code = tl.minimum(code, 7)
    return code | ((bits >> 28) & 8)


@triton.jit
def _most(x):
    """``[..., 4, 4]`` -> ``[..., 1, 1]``."""
    return tl.max(tl.max(x, -1, keep_dims=True), -2, keep_dims=True)


@triton.jit
def _below_zero(bits):
    """As unsigned numbers: the nearer to zero the larger, and zero itself the least."""
    return (-bits).to(tl.uint32, bitcast=True)


@triton.jit
def _fits(low, high, scale):
    """Whether a block is exact at a scale that is above what the rule gives.

    It is if nothing but zero is below code 1, and no fraction is left. Counting instructions pays:
    here integer arithmetic, not memory, is what takes the time.
    """
    nearest = _most(tl.maximum(_below_zero(low), _below_zero(high)))  # to zero
    half = _power(scale - 1).to(tl.int32, bitcast=True)
    lost = (_scaled(low, scale) | _scaled(high, scale)) & _FRACTION
    return (nearest <= _below_zero(half)) & (_most(lost) == 0)


@triton.jit
def _quantized(
    even, odd, hint, carry, HINTED: tl.constexpr, CUTS: tl.constexpr, LONG: tl.constexpr
):
    """Float32 bits of a block's even and odd elements -> its bytes and its scale.

    Args:
        even: ``[..., 4, 4]``.
        odd: likewise.
        hint: ``[..., 1, 1]``.
        carry: the rule, as what makes its ``m`` overflow into the exponent.
        HINTED: whether there is a hint.
        CUTS: whether to look at every element for codes past the largest, which the rule "floor"
            makes at any scale, and the others at the largest only.
        LONG: whether fractions are longer than bfloat16's.

    Returns:
        int32 ``[..., 4, 4]`` and ``[..., 1, 1]``.

    """
    low, high = even & _MAGNITUDE, odd & _MAGNITUDE
    if LONG:  # 24 bits do not fit a subnormal, 12 do; the last says "and more", and breaks ties
        low = (low | ((low & _REST) + _REST)) & ~_REST
        high = (high | ((high & _REST) + _REST)) & ~_REST
    largest = _most(tl.maximum(low, high))
    largest = tl.minimum(largest, _INFINITY)
    scale = ((largest + carry) >> 23) - 2
    scale = tl.minimum(tl.maximum(scale, 0), _LARGEST_SCALE)
    if HINTED:
        above = hint - scale
        near = (above >= 1) & (above <= _FARTHEST)  # form.SHIFTED says why no other can be
        wanted = tl.where((hint != _NAN_SCALE) & (near | (largest == 0)), hint, scale)
        # Most programs find nothing to do here, and then the hint costs its reading only.
        rare = tl.max(tl.where(largest > _LARGEST, 256, 0) | (wanted ^ scale), None)
        if rare != 0:
            scale = tl.where(_fits(low, high, wanted), wanted, scale)
        if rare >= 256 and not CUTS:
            low, high = tl.minimum(low, _LARGEST), tl.minimum(high, _LARGEST)
    codes = _nearest(_scaled(low, scale), even, CUTS)
    codes |= _nearest(_scaled(high, scale), odd, CUTS) << 4
    codes = tl.where(largest == _INFINITY, 0, codes)
    scale = tl.where(largest == _INFINITY, _NAN_SCALE, scale)
    return codes, scale


# --- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _units(
    outer, e_step, a_step, b_step, k_step, ROW: tl.constexpr, INNER: tl.constexpr,
    SIZE: tl.constexpr, LAYOUT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The units (words or blocks, of ``SIZE`` elements) of a program; a row of K has ``ROW``.

    Either a tile of ``TALL`` rows of one b by ``WIDE`` units, or a run of ``WIDE``, with ``TALL`` 1.

    Returns:
        ``[TALL, WIDE]``: places in stored order, first places in the view, and which units exist.

    """
    pid = tl.program_id(0)
    if LAYOUT == "tiles":  # those along A follow each other, as they share pages of memory
        tiles = (outer + TALL - 1) // TALL
        across = (ROW + WIDE - 1) // WIDE
        a = (pid % tiles * TALL + tl.arange(0, TALL))[:, None]
        unit = (pid // tiles % across * WIDE + tl.arange(0, WIDE))[None, :]
        rest = pid // tiles // across
        e, b = (rest // INNER).to(tl.int64), (rest % INNER).to(tl.int64)
        place = ((e * outer + a) * INNER + b) * ROW + unit
        offset = e * e_step + b * b_step + a.to(tl.int64) * a_step
        offset += unit.to(tl.int64) * (SIZE * k_step)
        mask = (a < outer) & (unit < ROW)
    else:
        units = tl.cast(outer, tl.int64) * (INNER * ROW)
        runs = ((units + WIDE - 1) // WIDE).to(tl.int32)
        e = (pid // runs).to(tl.int64)
        start = (pid % runs).to(tl.int64) * WIDE
        lane = tl.arange(0, WIDE)[None, :]
        mask = start + lane < units
        place = e * units + start + lane
        if LAYOUT == "whole":
            offset = place * SIZE
        else:  # long division by program; by lane only one of 32 bits, by a constant
            first = start // ROW
            column = (start - first * ROW).to(tl.int32) + lane
            row = first.to(tl.int32) + column // ROW
            offset = e * e_step + (row // INNER).to(tl.int64) * a_step
            offset += (row % INNER).to(tl.int64) * b_step + column % ROW * SIZE
    return place, offset, mask


@triton.jit
def _decode(
    blocks, scales, view,
    outer, e_step, a_step, b_step, k_step, ROW: tl.constexpr, INNER: tl.constexpr,
    LAYOUT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A word to a lane: 4 bytes in, and 16 out, the widest store there is."""
    place, offset, mask = _units(
        outer, e_step, a_step, b_step, k_step, ROW, INNER, 8, LAYOUT, TALL, WIDE
    )
    words = tl.load(blocks + place, mask, 0)
    scale = tl.load(scales + (place >> 2), mask, 0).to(tl.int32)
    values = tl.reshape(_values(words, scale), (TALL, WIDE, 8))
    at = offset[:, :, None] + tl.arange(0, 8).to(tl.int64) * k_step
    tl.store(view + at, values, mask[:, :, None])


@triton.jit
def _encode(
    view, carry, hint, blocks, scales,
    outer, e_step, a_step, b_step, k_step, ROW: tl.constexpr, INNER: tl.constexpr,
    LAYOUT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    HINTED: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Neighbours along K are read together where they can be; with ``PAIRS`` as one word."""
    SIZE: tl.constexpr = 16 if PAIRS else 32
    place, offset, mask = _units(
        outer, e_step, a_step, b_step, k_step, ROW, INNER, SIZE, LAYOUT, TALL, WIDE
    )
    one, there = place[:, :, None, None], mask[:, :, None, None]
    byte, word = tl.arange(0, 4), tl.arange(0, 4)[:, None]
    pair = (word * 4 + byte).to(tl.int64)
    if PAIRS:
        pairs = tl.load(view + (offset[:, :, None, None] + pair), there, 0)
        even, odd = pairs << 16, pairs & -0x10000
    elif LAYOUT != "tiles":  # neighbours in one load
        at = offset[:, :, None, None] + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)
        values = tl.load(view + at, there, 0).to(tl.int32)
        even, odd = tl.split(tl.reshape(values, (TALL, WIDE, 4, 4, 2)))
    else:
        at = offset[:, :, None, None] + pair * (2 * k_step)
        even = tl.load(view + at, there, 0).to(tl.int32)
        odd = tl.load(view + (at + k_step), there, 0).to(tl.int32)
    if not (PAIRS or LONG):
        even, odd = even << 16, odd << 16
    wanted = tl.load(hint + one, there, 0).to(tl.int32) if HINTED else 0
    codes, scale = _quantized(even, odd, wanted, carry, HINTED, CUTS, LONG)
    words = tl.sum(codes << (8 * byte), -1)
    tl.store(blocks + (place[:, :, None] * 4 + tl.arange(0, 4)), words, mask[:, :, None])
    tl.store(scales + one, scale.to(tl.uint8), there)
