"""MXFP4 on the CPU by numba: loops that LLVM turns into vector instructions, one core per thread.

Kernels are compiled on first use and cached on disk, numbers of ``form.py`` included, for as long as
this file is the same: change it when those change. They let go of the GIL, and are not numba's own
parallel loops: those abort when several Python threads call them, as a conversion does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numba.extending
import numpy as np
import torch
from llvmlite import ir

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BLOCK, BYTES, LARGEST_SCALE, NAN_SCALE, SHIFTED, Rule
from gptoss_kernels.mxfp4.threads import contiguous, scratch, spread
from gptoss_kernels.mxfp4.views import chunks
from gptoss_kernels.vectors import block, kernel, like, places, reduced, repeat

if TYPE_CHECKING:
    from torch import Tensor

_DIRECT = 1 << 16  # blocks in a job that works in place
_STAGED = 1 << 14  # blocks in a job that goes through a buffer, which should stay in the cache
_PAST_CACHE = 32 << 20  # bytes; a larger result would push out all else, and not stay itself
LINE = 64  # bytes of a cache line, and of a decoded block
_FRACTION = {16: 7, 32: 23}  # fraction bits, by width


_inline = numba.njit(inline="always")
i32: Any
i64: Any
i32, i64 = np.int32, np.int64
u64 = np.uint64  # for places: signed ones are checked for being negative

# The E2M1 magnitudes in units of 0.25
_QUARTERS = np.array([0, 2, 4, 6, 8, 12, 16, 24], dtype=np.int64)
_NO_HINT = np.empty((0, 0), dtype=np.uint8)
_SHIFTED = np.array([[-1 if c is None else c for c in row] for row in SHIFTED], dtype=np.int64)


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``; exact."""
    direct = _is_direct(view)
    pairs = table.pairs(view.device).numpy()
    stream = direct and view.nbytes >= _PAST_CACHE and _on_lines(view)

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        made = rows if direct else scratch(0, rows.shape, rows.dtype, rows.device)
        packed = blocks[part].view(-1).numpy(), scales[part].numpy()
        _decode_rows(*packed, _flat(made, torch.int32), *_halves(made), pairs, stream)
        if not direct:
            rows.copy_(made)

    spread(work, list(chunks(view, _DIRECT if direct else _STAGED)))


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""
    direct = view.stride(-1) == 1
    whole = torch.int16 if view.itemsize == 2 else torch.int32
    fraction = _FRACTION[8 * view.itemsize]
    carry = table.carry(rule, fraction)

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        if not direct:
            rows = contiguous(rows)
        wanted = _NO_HINT if hint is None else hint[part].numpy()
        packed = blocks[part].view(-1).numpy(), scales[part].numpy()
        shape = (rows.shape[1], rows.stride(0), rows.stride(1))
        _encode_rows(_flat(rows, whole), *shape, fraction, carry, wanted, *packed)

    spread(work, list(chunks(view, _DIRECT if direct else _STAGED)))


def _is_direct(view: Tensor) -> bool:
    """Whether rows can be written in place, two values at a time."""
    even = all(s % 2 == 0 for s in (*view.stride()[:-1], view.storage_offset()))
    return view.stride(-1) == 1 and even


def _on_lines(view: Tensor) -> bool:
    """Whether every row begins on a cache line."""
    starts = (view.data_ptr(), *(s * view.itemsize for s in view.stride()[:-1]))
    return all(start % LINE == 0 for start in starts)


def _halves(rows: Tensor) -> tuple[int, int, int]:
    """Inner rows, and both strides, in pairs of values."""
    return rows.shape[1], rows.stride(0) // 2, rows.stride(1) // 2


def _flat(rows: Tensor, dtype: torch.dtype) -> Any:
    """All memory from the first to the last element, as a contiguous numpy array of integers."""
    span = 1 + sum((n - 1) * s for n, s in zip(rows.shape, rows.stride(), strict=True))
    flat = rows.as_strided((span,), (1,), rows.storage_offset())
    return flat.view(dtype).numpy()


# --- decoding ------------------------------------------------------------------------------------


# What is done to every block is written as LLVM's vectors, all of it at once, here and below.


def _storing(*, past_cache: bool) -> Any:
    """A function that decodes a block of scale 2 to 252; ``past_cache`` needs an aligned place."""

    @numba.extending.intrinsic
    def store(typing: Any, blocks: Any, source: Any, exponent: Any, out: Any, place: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, begin, exponent_, values, place_ = arguments
            data = builder.load(block(context, builder, packed, blocks, begin, BYTES), align=1)
            words = builder.zext(data, ir.VectorType(ir.IntType(32), BYTES))
            made = _two_values(builder, words, repeat(builder, exponent_, words))
            target = block(context, builder, values, out, place_, BYTES)
            done = builder.store(made, target, align=LINE if past_cache else 4)
            if past_cache:
                yes = builder.module.add_metadata([ir.IntType(32)(1)])
                done.set_metadata("nontemporal", yes)
            return context.get_dummy_value()

        return numba.types.none(blocks, source, numba.types.int32, out, place), emit

    return store


_store_values, _stream_values = _storing(past_cache=False), _storing(past_cache=True)


def _two_values(b: Any, byte: Any, exponent: Any) -> Any:
    """Both codes of each byte as bfloat16 bits, one word for two.

    Magnitude c >= 2 is ``c << 6`` plus ``(scale - 1) << 7``, which ``exponent`` holds twice: its first
    two bits count up the exponent, its last is the first bit of the fraction. Magnitude 1 is
    a power of two, without that bit; 0 is nothing.
    """
    halves = ir.VectorType(ir.IntType(16), 2 * BYTES)
    codes = b.bitcast(b.or_(byte, b.shl(byte, like(byte, 12))), halves)
    magnitude = b.and_(codes, like(codes, 7))
    none, one = (b.icmp_signed("==", magnitude, like(codes, n)) for n in (0, 1))
    counted = b.shl(b.add(magnitude, b.sext(one, halves)), like(codes, 6))
    bits = b.select(none, like(codes, 0), b.add(counted, b.bitcast(exponent, halves)))
    sign = b.shl(b.and_(codes, like(codes, 8)), like(codes, 12))
    return b.bitcast(b.or_(bits, sign), byte.type)


@numba.extending.intrinsic
def _fence(typing: Any) -> Any:
    """Order stores past the cache before whatever tells another thread that they are done."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.types.none(), emit


@kernel
def _decode_rows(
    blocks: Any,
    scales: Any,
    out: Any,
    inner: int,
    outer_step: int,
    inner_step: int,
    pairs: Any,
    stream: bool,
) -> None:
    """Rows ``[R, G]`` of scales to places ``a * outer_step + b * inner_step`` of ``out``.

    ``stream`` writes past the cache; every row has to begin on a cache line then.
    """
    rows, groups = scales.shape
    source = u64(0)
    for row in range(rows):
        place = u64((row // inner) * outer_step + (row % inner) * inner_step)
        for group in range(groups):
            scale = i32(scales[row, group])
            exponent = (scale - i32(1)) * i32(0x00800080)
            if not 2 <= scale <= 252:  # subnormal, infinite or NaN
                for k in range(BYTES):
                    both = (u64(scale) << u64(8)) | u64(blocks[source + u64(k)])
                    out[place + u64(k)] = pairs[both]
            elif stream:
                _stream_values(blocks, source, exponent, out, place)
            else:
                _store_values(blocks, source, exponent, out, place)
            place += u64(BYTES)
            source += u64(BYTES)
    if stream:
        _fence()


# --- encoding ------------------------------------------------------------------------------------


@numba.extending.intrinsic
def _largest(typing: Any, values: Any, start: Any) -> Any:
    """The bits of the largest magnitude of a block."""
    width = values.dtype.bitwidth

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, begin = arguments
        x = builder.load(block(context, builder, array, values, begin, BLOCK), align=width // 8)
        magnitude = builder.and_(x, like(x, (1 << (width - 1)) - 1))
        return reduced(builder, "smax", magnitude)

    return values.dtype(values, start), emit


@numba.extending.intrinsic
def _store_codes(typing: Any, values: Any, start: Any, base: Any, blocks: Any, packed: Any) -> Any:
    """Nearest codes of a block of normal numbers, packed; see ``_codes``."""
    width = values.dtype.bitwidth

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, begin, base_, bytes_, place = arguments
        x = builder.load(block(context, builder, array, values, begin, BLOCK), align=width // 8)
        codes = _codes(builder, x, base_, _FRACTION[width])
        low, high = (_every_other(builder, codes, first) for first in (0, 1))
        both = builder.or_(low, builder.shl(high, like(high, 4)))
        both = builder.trunc(both, ir.VectorType(ir.IntType(8), BYTES))
        builder.store(both, block(context, builder, bytes_, blocks, place, BYTES), align=1)
        return context.get_dummy_value()

    return numba.types.none(values, start, values.dtype, blocks, packed), emit


def _codes(b: Any, x: Any, base: Any, fraction: int) -> Any:
    """The steps of ``table.py``, on the vector ``x``; ``base`` is subtracted from each magnitude."""
    step = fraction - 1
    magnitude = b.and_(x, like(x, (1 << (8 + fraction)) - 1))
    t = b.sub(magnitude, repeat(b, base, x))
    near = b.add(t, b.and_(b.ashr(t, like(t, step)), like(t, 1)))
    near = b.ashr(b.add(near, like(t, (1 << (step - 1)) - 1)), like(t, step))
    near = b.select(b.icmp_signed("<", near, like(t, 9)), near, like(t, 9))
    near = b.sub(near, like(t, 2))
    quarter, three = (b.icmp_signed(">", t, like(t, n)) for n in (0, (3 << step) - 1))
    small = b.add(b.zext(quarter, t.type), b.zext(three, t.type))
    sign = b.and_(b.ashr(x, like(x, 5 + fraction)), like(x, 8))
    return b.or_(b.select(b.icmp_signed(">", near, small), near, small), sign)


def _every_other(builder: Any, vector: Any, first: int) -> Any:
    return builder.shuffle_vector(vector, vector, places(list(range(first, BLOCK, 2))))


@kernel
def _encode_rows(
    values: Any,
    inner: int,
    outer_step: int,
    inner_step: int,
    fraction: int,
    carry: int,
    hints: Any,
    blocks: Any,
    scales: Any,
) -> None:
    """Rows ``[R, G]`` of blocks from places ``a * outer_step + b * inner_step`` of ``values``."""
    rows, groups = scales.shape
    packed = u64(0)
    for row in range(rows):
        start = u64((row // inner) * outer_step + (row % inner) * inner_step)
        for group in range(groups):
            most = i64(_largest(values, start))
            scale = min(max(((most + carry) >> fraction) - 2, 0), LARGEST_SCALE)
            if most == 0 or scale > 2:
                _store_codes(values, start, max(scale - 2, 1) << fraction, blocks, packed)
            else:
                _small_codes(values, start, scale, fraction, blocks, packed)
            if hints.size:
                hint = i64(hints[row, group])
                if (hint != scale and hint != NAN_SCALE) and (
                    most == 0 or _take_hint(values, start, scale, hint, fraction, blocks, packed)
                ):
                    scale = hint
            if most >= 255 << fraction:
                scale = NAN_SCALE
                for k in range(BYTES):
                    blocks[packed + u64(k)] = 0
            scales[row, group] = scale
            start += u64(BLOCK)
            packed += u64(BYTES)


@_inline
def _magnitude(value: Any, fraction: int) -> Any:
    """The bits of a value without its sign."""
    return i64(value) & ((1 << (8 + fraction)) - 1)


@_inline
def _quanta(magnitude: int, fraction: int) -> int:
    """A small magnitude in units of its format's smallest subnormal."""
    exponent = magnitude >> fraction
    rest = magnitude & ((1 << fraction) - 1)
    return rest if exponent == 0 else (rest | (1 << fraction)) << (exponent - 1)


@kernel
def _small_codes(
    values: Any, start: int, scale: int, fraction: int, blocks: Any, packed: int
) -> None:
    """The nearest codes at a scale of 0 to 2, where elements may be subnormal; ties to even."""
    quarter = 1 << (scale + fraction - 3)  # 0.25 at this scale, in quanta
    for k in range(BLOCK):
        value = values[start + u64(k)]
        x = _quanta(_magnitude(value, fraction), fraction)
        code = i64(x > quarter) + i64(x >= 3 * quarter) + i64(x > 5 * quarter)
        code += i64(x >= 7 * quarter) + i64(x > 10 * quarter) + i64(x >= 14 * quarter)
        code += i64(x > 20 * quarter) + (8 if value < 0 else 0)
        place = packed + u64(k // 2)
        blocks[place] = code if k % 2 == 0 else blocks[place] | (code << 4)


@kernel
def _take_hint(
    values: Any, start: int, scale: int, hint: int, fraction: int, blocks: Any, packed: int
) -> bool:
    """Put the codes at the hint in place of those at ``scale``, if all of them are exact."""
    above = hint - scale
    if above < 1 or above > 3:
        return False
    for k in range(BLOCK):
        code = (i64(blocks[packed + u64(k // 2)]) >> (k % 2 * 4)) & 7
        bits = _magnitude(values[start + u64(k)], fraction)
        if _SHIFTED[above, code] < 0:
            return False
        if scale <= 2:
            exact = _quanta(bits, fraction) == _QUARTERS[code] << (scale + fraction - 3)
        elif code < 2:
            exact = bits == code * ((scale - 1) << fraction)
        else:
            exact = bits == (code << (fraction - 1)) + ((scale - 1) << fraction)
        if not exact:
            return False
    for k in range(BYTES):
        byte = i64(blocks[packed + u64(k)])
        shifted = _SHIFTED[above, byte & 7] | (_SHIFTED[above, (byte >> 4) & 7] << 4)
        blocks[packed + u64(k)] = shifted | (byte & 0x88)
    return True
