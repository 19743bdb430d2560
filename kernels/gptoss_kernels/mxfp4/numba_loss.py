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
from gptoss_kernels.mxfp4.numba import (
    _block,
    _flat,
    _halves,
    _is_direct,
    _kernel,
    _like,
    _repeat,
    _two_values,
)
from gptoss_kernels.mxfp4.threads import scratch

if TYPE_CHECKING:
    from torch import Tensor

i32: Any
u64, i32, f32, f64 = np.uint64, np.int32, np.float32, np.float64
_HIGH = -65536  # the bits of a word's second value, which are those of a float32
_LEAST, _MOST = 1e-20, 1e30  # sums of squares of a block, in units of its scale, that float32 holds
_inline: Any = numba.njit(inline="always")
_intrinsic: Any = numba.extending.intrinsic
_single, _word = ir.FloatType(), ir.IntType(32)
_SINGLES = ir.VectorType(_single, BYTES)
_UNITS = 4.0 ** (np.arange(256) - BIAS)  # what the square of a scale's unit is


def compare(rows: Tensor, blocks: Tensor, scales: Tensor) -> tuple[int, float, float, float, int]:
    """As ``loss._compare``, of bfloat16 rows ``[a, B, K]`` and what their blocks decode to."""
    if not _is_direct(rows):
        rows = scratch(9, rows.shape, rows.dtype, rows.device).copy_(rows)
    pairs = table.pairs(rows.device).numpy()
    packed = blocks.view(-1).numpy(), scales.view(-1, rows.shape[-1] // BLOCK).numpy()
    found = _compare(_flat(rows, torch.int32), *_halves(rows), *packed, pairs)
    kept, largest, squares, power, nonfinite = found
    return int(kept), float(largest), float(squares), float(power), int(nonfinite)


# --- a block, as vectors -------------------------------------------------------------------------


def _loaded(context: Any, b: Any, signature: Any, arguments: Any) -> tuple[Any, Any]:
    """The words of a block's values, and of what its bytes decode to."""
    array, start, packed, source, exponent = arguments[:5]
    kinds = signature.args
    words = b.load(_block(context, b, array, kinds[0], start, BYTES), align=4)
    codes = b.load(_block(context, b, packed, kinds[2], source, BYTES), align=1)
    codes = b.zext(codes, words.type)
    return words, _two_values(b, codes, _repeat(b, exponent, codes))


def _in_units(b: Any, words: Any, unit: Any) -> list[Any]:
    """Both values of every word times ``unit``, as vectors of float32."""
    both = b.shl(words, _like(words, 16)), b.and_(words, _like(words, _HIGH))
    once = b.insert_element(ir.Constant(_SINGLES, ir.Undefined), unit, _word(0))
    units = b.shuffle_vector(once, once, ir.Constant(ir.VectorType(_word, BYTES), [0] * BYTES))
    return [b.fmul(b.bitcast(half, _SINGLES), units) for half in both]


def _reduced(b: Any, name: str, vector: Any, *first: Any) -> Any:
    """A vector's elements put together, in any order."""
    kind = vector.type.element
    letter = "f32" if kind == _single else "i32"
    arguments = [*(value.type for value in first), vector.type]
    function = b.module.declare_intrinsic(
        f"llvm.vector.reduce.{name}.v{BYTES}{letter}", (), ir.FunctionType(kind, arguments)
    )
    flags = ("reassoc", "nnan") if kind == _single else ()
    return b.call(function, [*first, vector], fastmath=flags)


def _squares(b: Any, halves: list[Any]) -> Any:
    low, high = (b.fmul(half, half) for half in halves)
    return _reduced(b, "fadd", b.fadd(low, high), ir.Constant(_single, 0.0))


@_intrinsic
def _look(
    typing: Any, words: Any, start: Any, blocks: Any, source: Any, exponent: Any, unit: Any
) -> Any:
    """Which bits of a block differ from what is decoded, and the sum of its values' squares."""
    result = numba.types.Tuple((numba.types.int32, numba.types.float32))

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, back = _loaded(context, b, signature, arguments)
        different = _reduced(b, "or", b.xor(values, back))
        power = _squares(b, _in_units(b, values, arguments[5]))
        return context.make_tuple(b, signature.return_type, [different, power])

    return result(words, start, blocks, source, numba.types.int32, numba.types.float32), emit


@_intrinsic
def _errors(
    typing: Any, words: Any, start: Any, blocks: Any, source: Any, exponent: Any, unit: Any
) -> Any:
    """The largest error of a block, and the sum of their squares."""
    result = numba.types.UniTuple(numba.types.float32, 2)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        pair = _loaded(context, b, signature, arguments)
        values, back = (_in_units(b, words, arguments[5]) for words in pair)
        errors = [b.fsub(x, y) for x, y in zip(back, values, strict=True)]
        kind = ir.FunctionType(_SINGLES, [_SINGLES])
        size = b.module.declare_intrinsic(f"llvm.fabs.v{BYTES}f32", (), kind)
        sizes = [b.call(size, [error]) for error in errors]
        larger = b.select(b.fcmp_ordered(">", *sizes), *sizes)
        both = [_reduced(b, "fmax", larger), _squares(b, errors)]
        return context.make_tuple(b, signature.return_type, both)

    return result(words, start, blocks, source, numba.types.int32, numba.types.float32), emit


# --- loops ---------------------------------------------------------------------------------------


@_inline
def _low(word: int) -> float:
    return f64(i32(word << 16).view(f32))


@_inline
def _high(word: int) -> float:
    return f64(i32(word & _HIGH).view(f32))


@_kernel
def _one_by_one(
    words: Any, start: int, blocks: Any, source: int, row: Any
) -> tuple[int, float, float, float, int]:
    """A block's result in float64, without values that are not finite. ``row``: the table's."""
    largest, squares, power, nonfinite, different = 0.0, 0.0, 0.0, 0, i32(0)
    for place in range(2 * BYTES):
        k = u64(place // 2)
        back = row[blocks[source + k]]
        word = words[start + k]
        different |= word ^ back
        value, again = (_high(word), _high(back)) if place % 2 else (_low(word), _low(back))
        if not math.isfinite(value):
            nonfinite += 1
            continue
        error = (again if math.isfinite(again) else 0.0) - value
        largest = max(largest, abs(error))
        squares += error * error
        power += value * value
    return int(different == 0), largest, squares, power, nonfinite


@_kernel
def _compare(
    words: Any, inner: int, outer_step: int, inner_step: int, blocks: Any, scales: Any, pairs: Any
) -> Any:
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
                different, size = _look(words, place, blocks, source, exponent, unit)
                if different == 0:
                    held = True
                    kept += 1
                    power += f64(size) * _UNITS[scale]
                elif _LEAST < size < _MOST:
                    most, total = _errors(words, place, blocks, source, exponent, unit)
                    if _LEAST < total < _MOST:
                        held = True
                        largest = max(largest, f64(most) * math.sqrt(_UNITS[scale]))
                        squares += f64(total) * _UNITS[scale]
                        power += f64(size) * _UNITS[scale]
            if not held:
                entry = u64(scale) << u64(8)
                same, worst, lost, strength, strange = _one_by_one(
                    words, place, blocks, source, pairs[entry : entry + u64(256)]
                )
                kept += same
                largest = max(largest, worst)
                squares += lost
                power += strength
                nonfinite += strange
            place += u64(BYTES)
            source += u64(BYTES)
    return kept, largest, squares, power, nonfinite
