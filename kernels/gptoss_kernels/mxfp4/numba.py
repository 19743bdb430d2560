"""MXFP4 on the CPU by numba: loops that LLVM turns into vector instructions, one core per thread.

Kernels are compiled on first use and cached on disk. They let go of the GIL, and are not numba's
own parallel loops: those abort when several Python threads call them, as a conversion does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numba.extending
import numpy as np
import torch

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BLOCK, LARGEST_SCALE, NAN_SCALE, SHIFTED, Rule
from gptoss_kernels.mxfp4.threads import contiguous, scratch, spread
from gptoss_kernels.mxfp4.views import chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_DIRECT = 1 << 16  # blocks in a job that works in place
_STAGED = 1 << 14  # blocks in a job that goes through a buffer, which should stay in the cache
_kernel = numba.njit(nogil=True, cache=True, error_model="numpy")
_inline = numba.njit(inline="always")
i32: Any
i64: Any
u8: Any
i32, i64, u8 = np.int32, np.int64, np.uint8
u64 = np.uint64  # for places: signed ones are checked for being negative

# 2, 4, 6, ... quarters: the E2M1 magnitudes in units of 0.25
_QUARTERS = np.array([0, 2, 4, 6, 8, 12, 16, 24], dtype=np.int64)
_NO_HINT = np.empty((0, 0), dtype=np.uint8)
_SHIFTED = np.array([[-1 if c is None else c for c in row] for row in SHIFTED], dtype=np.int16)


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``; exact."""
    direct = _is_direct(view)
    pairs = table.pairs(view.device).numpy()

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        made = rows if direct else scratch(0, rows.shape, rows.dtype, rows.device)
        packed = blocks[part].numpy().reshape(-1), scales[part].numpy()
        _decode_rows(*packed, _flat(made, torch.int32), *_halves(made), pairs)
        if not direct:
            rows.copy_(made)

    spread(work, list(chunks(view, _DIRECT if direct else _STAGED)))


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""
    direct = view.stride(-1) == 1
    kernel, whole, fraction = (
        (_encode_bf16, torch.int16, 7) if view.itemsize == 2 else (_encode_f32, torch.int32, 23)
    )
    carry = table.carry(rule, fraction)

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        if not direct:
            rows = contiguous(rows)
        wanted = _NO_HINT if hint is None else hint[part].numpy()
        packed = blocks[part].numpy().reshape(-1), scales[part].numpy()
        shape = (rows.shape[1], rows.stride(0), rows.stride(1))
        kernel(_flat(rows, whole), *shape, carry, wanted, *packed)

    spread(work, list(chunks(view, _DIRECT if direct else _STAGED)))


def _is_direct(view: Tensor) -> bool:
    """Whether rows can be written in place, two values at a time."""
    even = all(s % 2 == 0 for s in (*view.stride()[:-1], view.storage_offset()))
    return view.stride(-1) == 1 and even


def _halves(rows: Tensor) -> tuple[int, int, int]:
    """Inner rows, and both strides, in pairs of values."""
    return rows.shape[1], rows.stride(0) // 2, rows.stride(1) // 2


def _flat(rows: Tensor, dtype: torch.dtype) -> Any:
    """All memory from the first to the last element, as a contiguous numpy array of integers."""
    span = 1 + sum((n - 1) * s for n, s in zip(rows.shape, rows.stride(), strict=True))
    flat = rows.as_strided((span,), (1,), rows.storage_offset())
    return flat.view(dtype).numpy()


# --- decoding ------------------------------------------------------------------------------------


@_inline
def _two_values(byte: Any, exponent: Any) -> Any:
    """Both codes of a byte as bfloat16 bits in one word, for scale bytes 2 to 252.

    Code c >= 2 is ``c << 6`` plus ``(scale - 1) << 7``, which ``exponent`` holds twice: its first
    two bits count up the exponent, its last is the first bit of the fraction. Code 1 is one power
    of two without that bit, code 0 is nothing.
    """
    codes = (byte | (byte << i32(12))) & i32(0x000F000F)
    magnitude = codes & i32(0x00070007)
    upper = ((magnitude >> i32(1)) | (magnitude >> i32(2))) & i32(0x00010001)
    lowest = magnitude & i32(0x00010001)
    one = lowest & ~upper
    mask = (upper | lowest) * i32(0xFFFF)
    bits = (magnitude << i32(6)) + exponent - (one << i32(6))
    return (bits & mask) | ((codes & i32(0x00080008)) << i32(12))


@_kernel
def _decode_rows(
    blocks: Any, scales: Any, out: Any, inner: int, outer_step: int, inner_step: int, pairs: Any
) -> None:
    """Rows ``[R, G]`` of scales to places ``a * outer_step + b * inner_step`` of ``out``."""
    rows, groups = scales.shape
    source = u64(0)
    for row in range(rows):
        place = u64((row // inner) * outer_step + (row % inner) * inner_step)
        for group in range(groups):
            scale = i32(scales[row, group])
            if 2 <= scale <= 252:
                exponent = (scale - i32(1)) * i32(0x00800080)
                for k in range(16):
                    out[place + u64(k)] = _two_values(i32(blocks[source + u64(k)]), exponent)
            else:  # subnormal, infinite or NaN
                for k in range(16):
                    both = (u64(scale) << u64(8)) | u64(blocks[source + u64(k)])
                    out[place + u64(k)] = pairs[both]
            place += u64(16)
            source += u64(16)


# --- encoding ------------------------------------------------------------------------------------


def _lane_op(emit: Callable[[Any, Any, Any], Any]) -> Any:
    """An operation on two integers of one type that stays in that type.

    Numba widens to 64 bits whatever is written, and LLVM does not always find its way back; the
    loops below would then work on 8 values at a time instead of 32.
    """

    @numba.extending.intrinsic
    def operation(typing: Any, left: Any, right: Any) -> Any:
        del typing, right
        return left(left, left), lambda context, builder, sig, args: emit(builder, *args)

    return operation


_add = _lane_op(lambda b, x, y: b.add(x, y))
_sub = _lane_op(lambda b, x, y: b.sub(x, y))
_and = _lane_op(lambda b, x, y: b.and_(x, y))
_or = _lane_op(lambda b, x, y: b.or_(x, y))
_shift = _lane_op(lambda b, x, y: b.ashr(x, y))
_max = _lane_op(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
_min = _lane_op(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
_above = _lane_op(lambda b, x, y: b.zext(b.icmp_signed(">", x, y), x.type))


def _encoder(lane: Any, word: Any, fraction: int) -> Any:
    """The kernel for values of ``fraction`` fraction bits in integers of type ``lane``, two to a word.

    The same steps as in ``table.py``; here a block is one loop, and so one or two vectors.
    """
    sign, step = 8 + fraction, fraction - 1
    mask = lane((1 << sign) - 1)
    half = lane((1 << (step - 1)) - 1)
    below_three_quarters = lane((3 << step) - 1)
    zero, one, two, eight, nine = map(lane, (0, 1, 2, 8, 9))
    to_half, to_sign = lane(step), lane(sign - 3)
    endless = 255 << fraction
    apart = 8 * np.dtype(lane).itemsize - 4

    @_kernel
    def kernel(
        values: Any,
        inner: int,
        outer_step: int,
        inner_step: int,
        carry: int,
        hints: Any,
        blocks: Any,
        scales: Any,
    ) -> None:
        rows, groups = scales.shape
        codes = np.empty(BLOCK, lane)
        couples = codes.view(word)
        packed = u64(0)
        for row in range(rows):
            start = u64((row // inner) * outer_step + (row % inner) * inner_step)
            for group in range(groups):
                block = values[start : start + u64(BLOCK)]
                most = zero
                for k in range(BLOCK):
                    most = _max(most, _and(block[k], mask))
                scale = min(max(((i64(most) + carry) >> fraction) - 2, 0), LARGEST_SCALE)
                if most == 0 or scale > 2:
                    base = lane(max(scale - 2, 1) << fraction)
                    for k in range(BLOCK):
                        t = _sub(_and(block[k], mask), base)
                        near = _add(_add(t, half), _and(_shift(t, to_half), one))
                        near = _sub(_min(_shift(near, to_half), nine), two)
                        low = _add(_above(t, zero), _above(t, below_three_quarters))
                        negative = _and(_shift(block[k], to_sign), eight)
                        codes[k] = _or(_max(near, low), negative)
                else:
                    _small_codes(block, scale, fraction, codes)
                if hints.size:
                    hint = i64(hints[row, group])
                    if (hint != scale and hint != NAN_SCALE) and (
                        most == 0 or _take_hint(block, codes, scale, hint, fraction)
                    ):
                        scale = hint
                if most >= endless:
                    scale = NAN_SCALE
                    codes[:] = zero
                for k in range(16):
                    blocks[packed + u64(k)] = u8(couples[k] | (couples[k] >> word(apart)))
                scales[row, group] = scale
                start += u64(BLOCK)
                packed += u64(16)

    return kernel


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


@_kernel
def _small_codes(block: Any, scale: int, fraction: int, codes: Any) -> None:
    """The nearest codes at a scale of 0 to 2, where elements may be subnormal; ties to even."""
    quarter = 1 << (scale + fraction - 3)  # 0.25 at this scale, in quanta
    for k in range(BLOCK):
        x = _quanta(_magnitude(block[k], fraction), fraction)
        code = i64(x > quarter) + i64(x >= 3 * quarter) + i64(x > 5 * quarter)
        code += i64(x >= 7 * quarter) + i64(x > 10 * quarter) + i64(x >= 14 * quarter)
        code += i64(x > 20 * quarter)
        codes[k] = code | (8 if block[k] < 0 else 0)


@_kernel
def _take_hint(block: Any, codes: Any, scale: int, hint: int, fraction: int) -> bool:
    """Put the codes at the hint in place of those at ``scale``, if all of them are exact."""
    above = hint - scale
    if above < 1 or above > 3:
        return False
    for k in range(BLOCK):
        code, bits = i64(codes[k]) & 7, _magnitude(block[k], fraction)
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
    for k in range(BLOCK):
        code = i64(codes[k])
        codes[k] = _SHIFTED[above, code & 7] | (code & 8)
    return True


_encode_bf16 = _encoder(np.int16, np.int32, 7)
_encode_f32 = _encoder(np.int32, np.int64, 23)
