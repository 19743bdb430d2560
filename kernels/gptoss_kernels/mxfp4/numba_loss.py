"""The comparison that ``loss.py`` makes of a chunk, in one pass by numba.

Decoding is by the table of ``table.py``, so it stays independent of the encoder it judges.
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
from gptoss_kernels.mxfp4.form import BYTES
from gptoss_kernels.mxfp4.numba import _block, _kernel, _like

if TYPE_CHECKING:
    from torch import Tensor

i32: Any
u64, i32, f32, f64 = np.uint64, np.int32, np.float32, np.float64
_HIGH = -65536  # the bits of a word's second value, which are those of a float32
_FINITE = 252  # up to this scale byte every code is
_inline: Any = numba.njit(inline="always")
_intrinsic: Any = numba.extending.intrinsic
_WIDE = ir.VectorType(ir.DoubleType(), BYTES)
_TWO = numba.types.UniTuple(numba.types.float64, 2)


def compare(value: Tensor, blocks: Tensor, scales: Tensor) -> tuple[int, float, float, float, int]:
    """As ``loss._compare``, of bfloat16 ``[N, 32]`` and what is to be decoded."""
    words = value.view(torch.int32).view(-1).numpy()
    pairs = table.pairs(value.device).numpy()
    kept, largest, squares, power, nonfinite = _compare(
        words, blocks.view(-1).numpy(), scales.view(-1).numpy(), pairs
    )
    return int(kept), float(largest), float(squares), float(power), int(nonfinite)


@_inline
def _low(word: int) -> float:
    return f64(i32(word << 16).view(f32))


@_inline
def _high(word: int) -> float:
    return f64(i32(word & _HIGH).view(f32))


def _halves(b: Any, words: Any) -> tuple[Any, Any]:
    """Both values of every word, as vectors of float64."""
    singles = ir.VectorType(ir.FloatType(), BYTES)
    bits = b.shl(words, _like(words, 16)), b.and_(words, _like(words, _HIGH))
    low, high = (b.fpext(b.bitcast(half, singles), _WIDE) for half in bits)
    return low, high


def _sum(b: Any, low: Any, high: Any) -> Any:
    """Of the squares of two vectors, in any order."""
    squares = b.fadd(b.fmul(low, low), b.fmul(high, high))
    kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), _WIDE])
    name = f"llvm.vector.reduce.fadd.v{BYTES}f64"
    function = b.module.declare_intrinsic(name, (), kind)
    return b.call(function, [ir.Constant(ir.DoubleType(), 0.0), squares], fastmath=("reassoc",))


@_intrinsic
def _power(typing: Any, words: Any, start: Any) -> Any:
    """The sum of the squares of a block."""

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        array, begin = arguments
        values = b.load(_block(context, b, array, words, begin, BYTES), align=4)
        return _sum(b, *_halves(b, values))

    return numba.types.float64(words, start), emit


@_intrinsic
def _errors(typing: Any, words: Any, start: Any, back: Any) -> Any:
    """The largest error of a block, and the sum of their squares; all is finite."""

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        array, begin, again = arguments
        none = ir.Constant(begin.type, 0)
        value = _halves(b, b.load(_block(context, b, array, words, begin, BYTES), align=4))
        made = _halves(b, b.load(_block(context, b, again, back, none, BYTES), align=4))
        errors = [b.fsub(x, y) for x, y in zip(made, value, strict=True)]
        sizes = [b.call(_unary(b, "fabs"), [error]) for error in errors]
        larger = b.select(b.fcmp_ordered(">", *sizes), *sizes)
        kind = ir.FunctionType(ir.DoubleType(), [_WIDE])
        most = b.module.declare_intrinsic(f"llvm.vector.reduce.fmax.v{BYTES}f64", (), kind)
        largest = b.call(most, [larger], fastmath=("nnan",))
        return context.make_tuple(b, signature.return_type, [largest, _sum(b, *errors)])

    return _TWO(words, start, back), emit


def _unary(b: Any, name: str) -> Any:
    kind = ir.FunctionType(_WIDE, [_WIDE])
    return b.module.declare_intrinsic(f"llvm.{name}.v{BYTES}f64", (), kind)


@_kernel
def _with_nonfinite(words: Any, start: int, back: Any) -> tuple[float, float, float, int]:
    """The same and the power, without values that are not finite, and how many of them there are."""
    largest, squares, power, nonfinite = 0.0, 0.0, 0.0, 0
    for place in range(2 * BYTES):
        k = place // 2
        value, again = _low(words[start + u64(k)]), _low(back[k])
        if place % 2:
            value, again = _high(words[start + u64(k)]), _high(back[k])
        if not math.isfinite(value):
            nonfinite += 1
            continue
        error = (again if math.isfinite(again) else 0.0) - value
        largest = max(largest, abs(error))
        squares += error * error
        power += value * value
    return largest, squares, power, nonfinite


@_kernel
def _compare(words: Any, blocks: Any, scales: Any, pairs: Any) -> Any:
    kept, nonfinite = 0, 0
    largest, squares, power = 0.0, 0.0, 0.0
    back = np.empty(BYTES, np.int32)
    for number in range(len(scales)):
        start = u64(number) * u64(BYTES)
        entry = u64(scales[number]) << u64(8)
        different = i32(0)
        for k in range(BYTES):
            back[k] = pairs[entry | u64(blocks[start + u64(k)])]
            different |= words[start + u64(k)] ^ back[k]
        kept += different == 0
        size = _power(words, start)
        if math.isfinite(size) and scales[number] <= _FINITE:
            power += size
            if different != 0:
                most, total = _errors(words, start, back)
                largest = max(largest, most)
                squares += total
        else:
            most, total, size, count = _with_nonfinite(words, start, back)
            largest = max(largest, most)
            squares += total
            power += size
            nonfinite += count
    return kept, largest, squares, power, nonfinite
