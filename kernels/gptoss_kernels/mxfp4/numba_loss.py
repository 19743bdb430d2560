"""The comparison that ``loss.py`` makes of a chunk, in one pass by numba.

What a block decodes to is compared in units of its scale, where codes are small numbers and a
float32 holds their squares. Blocks for which that would not do are left to a loop in float64: those
of scales 0, 1 and 253 to 255, and those with values too far from their scale, NaN and infinity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numba.extending
import numpy as np
import torch
from llvmlite import ir

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BIAS, BLOCK, BYTES
from gptoss_kernels.mxfp4.numba import _flat, _halves, _is_direct, _two_values
from gptoss_kernels.mxfp4.threads import scratch
from gptoss_kernels.vectors import block, kernel, like, places, reduced, repeat

if TYPE_CHECKING:
    from torch import Tensor

i32: Any
u64, i32, f32, f64 = np.uint64, np.int32, np.float32, np.float64
_HIGH = -65536  # the bits of a word's second value, which are those of a float32
_LEAST, _MOST = 1e-20, 1e30  # sums of squares of a block, in units of its scale, that float32 holds
_intrinsic: Any = numba.extending.intrinsic
_word = ir.IntType(32)
_SINGLES = ir.VectorType(ir.FloatType(), BYTES)
_UNITS = 4.0 ** (np.arange(256) - BIAS)  # what the square of a scale's unit is


def compare(rows: Tensor, blocks: Tensor, scales: Tensor) -> tuple[int, float, float, float, int]:
    """As ``loss._compare``, of bfloat16 or float32 rows ``[a, B, K]`` and what their blocks decode
    to.
    """
    if not _is_direct(rows):
        rows = scratch(9, rows.shape, rows.dtype, rows.device).copy_(rows)
    pairs = table.pairs(rows.device).numpy()
    packed = blocks.view(-1).numpy(), scales.view(-1, rows.shape[-1] // BLOCK).numpy()
    if rows.dtype == torch.bfloat16:
        words, strides, step = _flat(rows, torch.int32), _halves(rows), BYTES
    else:
        words, step = _flat(rows, torch.float32), BLOCK
        strides = rows.shape[1], rows.stride(0), rows.stride(1)
    found = _compare(words, *strides, u64(step), *packed, pairs)
    kept, largest, squares, power, nonfinite = found
    return int(kept), float(largest), float(squares), float(power), int(nonfinite)


# --- a block, as vectors -------------------------------------------------------------------------

# Values are words of two bfloat16, an array of int32, or float32, an array of that.


def _split(b: Any, words: Any) -> list[Any]:
    """Both bfloat16 values of every word, as the bits of float32."""
    return [b.shl(words, like(words, 16)), b.and_(words, like(words, _HIGH))]


def _loaded(context: Any, b: Any, signature: Any, arguments: Any) -> tuple[list[Any], list[Any]]:
    """A block's values, and what its bytes decode to: the even and the odd ones of each, as the bits
    of float32.
    """
    array, start, packed, source, exponent = arguments[:5]
    kinds = signature.args
    codes = b.load(block(context, b, packed, kinds[2], source, BYTES), align=1)
    codes = b.zext(codes, ir.VectorType(_word, BYTES))
    back = _split(b, _two_values(b, codes, repeat(b, exponent, codes)))
    if kinds[0].dtype == numba.types.int32:
        words = b.load(block(context, b, array, kinds[0], start, BYTES), align=4)
        return _split(b, words), back
    values = b.load(block(context, b, array, kinds[0], start, BLOCK), align=4)
    words = b.bitcast(values, ir.VectorType(_word, BLOCK))
    halves = (places(list(range(first, BLOCK, 2))) for first in (0, 1))
    return [b.shuffle_vector(words, words, half) for half in halves], back


def _in_units(b: Any, halves: list[Any], unit: Any) -> list[Any]:
    """Float32 bits times ``unit``, as float32."""
    values = [b.bitcast(half, _SINGLES) for half in halves]
    return [b.fmul(value, repeat(b, unit, value)) for value in values]


def _squares(b: Any, halves: list[Any]) -> Any:
    low, high = (b.fmul(half, half) for half in halves)
    return reduced(b, "fadd", b.fadd(low, high), ir.Constant(ir.FloatType(), 0.0))


@_intrinsic
def _look(
    typing: Any, values: Any, start: Any, blocks: Any, source: Any, exponent: Any, unit: Any
) -> Any:
    """Which bits of a block differ from what is decoded, and the sum of its values' squares."""
    result = numba.types.Tuple((numba.types.int32, numba.types.float32))

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        own, back = _loaded(context, b, signature, arguments)
        low, high = (b.xor(x, y) for x, y in zip(own, back, strict=True))
        different = reduced(b, "or", b.or_(low, high))
        power = _squares(b, _in_units(b, own, arguments[5]))
        return context.make_tuple(b, signature.return_type, [different, power])

    return result(values, start, blocks, source, numba.types.int32, numba.types.float32), emit


@_intrinsic
def _errors(
    typing: Any, values: Any, start: Any, blocks: Any, source: Any, exponent: Any, unit: Any
) -> Any:
    """The largest error of a block, and the sum of their squares."""
    result = numba.types.UniTuple(numba.types.float32, 2)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        pair = _loaded(context, b, signature, arguments)
        own, back = (_in_units(b, halves, arguments[5]) for halves in pair)
        errors = [b.fsub(x, y) for x, y in zip(back, own, strict=True)]
        kind = ir.FunctionType(_SINGLES, [_SINGLES])
        size = b.module.declare_intrinsic(f"llvm.fabs.v{BYTES}f32", (), kind)
        sizes = [b.call(size, [error]) for error in errors]
        larger = b.select(b.fcmp_ordered(">", *sizes), *sizes)
        both = [reduced(b, "fmax", larger), _squares(b, errors)]
        return context.make_tuple(b, signature.return_type, both)

    return result(values, start, blocks, source, numba.types.int32, numba.types.float32), emit


# --- loops ---------------------------------------------------------------------------------------


@_intrinsic
def _bits(typing: Any, values: Any, start: Any, number: Any) -> Any:
    """Of one value of a block, as float32 has them."""
    is_narrow = values.dtype == numba.types.int32

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        array, begin, number_ = arguments
        first = b.gep(context.make_array(values)(context, b, array).data, [begin])
        kind = ir.IntType(16) if is_narrow else _word
        found = b.load(b.gep(b.bitcast(first, kind.as_pointer()), [number_]))
        return b.shl(b.zext(found, _word), _word(16)) if is_narrow else found

    return numba.types.int32(values, start, number), emit


@kernel
def _one_by_one(
    values: Any, start: int, blocks: Any, source: int, row: Any
) -> tuple[int, float, float, float, int]:
    """A block's result in float64, without values that are not finite. ``row``: the table's."""
    largest, squares, power, nonfinite, different = 0.0, 0.0, 0.0, 0, i32(0)
    for place in range(BLOCK):
        both = row[blocks[source + u64(place // 2)]]
        bits = _bits(values, start, u64(place))
        decoded = i32(both & _HIGH if place % 2 else both << 16)
        different |= bits ^ decoded
        value, again = f64(i32(bits).view(f32)), f64(i32(decoded).view(f32))
        if not math.isfinite(value):
            nonfinite += 1
            continue
        error = (again if math.isfinite(again) else 0.0) - value
        largest = max(largest, abs(error))
        squares += error * error
        power += value * value
    return int(different == 0), largest, squares, power, nonfinite


@kernel
def _compare(
    values: Any,
    inner: int,
    outer_step: int,
    inner_step: int,
    step: int,
    blocks: Any,
    scales: Any,
    pairs: Any,
) -> Any:
    """Rows ``[R, G]`` of blocks, ``step`` items of ``values`` each, in place as ``_decode_rows``
    would write them.
    """
    rows, groups = scales.shape
    kept, nonfinite = 0, 0
    largest, squares, power = 0.0, 0.0, 0.0
    source = u64(0)
    for row in range(rows):
        place = u64((row // inner) * outer_step + (row % inner) * inner_step)
        for group in range(groups):
            scale = i32(scales[row, group])
            exponent = (scale - i32(1)) * i32(0x00800080)
            unit = i32((i32(254) - scale) << i32(23)).view(f32)  # 1 / 2**(scale - 127)
            held = False
            if 2 <= scale <= 252:
                different, size = _look(values, place, blocks, source, exponent, unit)
                if different == 0:
                    held = True
                    kept += 1
                    power += f64(size) * _UNITS[scale]
                elif _LEAST < size < _MOST:
                    most, total = _errors(values, place, blocks, source, exponent, unit)
                    if _LEAST < total < _MOST:
                        held = True
                        largest = max(largest, f64(most) * math.sqrt(_UNITS[scale]))
                        squares += f64(total) * _UNITS[scale]
                        power += f64(size) * _UNITS[scale]
            if not held:
                entry = u64(scale) << u64(8)
                same, worst, lost, strength, strange = _one_by_one(
                    values, place, blocks, source, pairs[entry : entry + u64(256)]
                )
                kept += same
                largest = max(largest, worst)
                squares += lost
                power += strength
                nonfinite += strange
            place += step
            source += u64(BYTES)
    return kept, largest, squares, power, nonfinite
