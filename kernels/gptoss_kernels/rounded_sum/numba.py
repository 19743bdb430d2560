"""By numba, for bfloat16 weights: a pass over all, as vectors.

Sums are in float32 over a block and in float64 over the blocks. A block that holds NaN, infinity or
numbers whose squares float32 does not hold is left to the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils

from gptoss_kernels.rounded_sum import reference
from gptoss_kernels.vectors import block, kernel, like, reduced, repeat

if TYPE_CHECKING:
    from torch import Tensor

u64: Any = np.uint64
_intrinsic = numba.extending.intrinsic
_LANES = 32
_BLOCK = 4096  # elements, a multiple of _LANES
_LEAST, _MOST = 1e-20, 1e30  # sums of squares of a block that float32 holds
_WORDS = ir.VectorType(ir.IntType(32), _LANES)
_SINGLES = ir.VectorType(ir.FloatType(), _LANES)


def rounded_sum(
    weight: Tensor, change: Tensor, scale: float, out: Tensor
) -> tuple[int, int, float, float, float, int]:
    """As ``gptoss_kernels.rounded_sum``; bfloat16 weights, contiguous, and no float16 ``out``."""
    flat = weight.view(-1), change.view(-1), out.view(-1)
    words = (flat[0].view(torch.int16), flat[1])
    made = flat[2].view(torch.int16) if out.dtype == torch.bfloat16 else flat[2]
    full = weight.numel() // _BLOCK
    left = np.ones(full + 1, dtype=bool)  # the last one is what no block holds
    different, largest, squares, power = _blocks(
        words[0].numpy(), words[1].numpy(), np.float32(scale), made.numpy(), left[:full]
    )
    kept, nonfinite = int((~left).sum()) * _BLOCK - different, 0
    for number in left.nonzero()[0]:
        part = slice(int(number) * _BLOCK, int(number + 1) * _BLOCK if number < full else None)
        found = reference.rounded_sum(flat[0][part], flat[1][part], scale, flat[2][part])
        kept += found[1]
        largest = max(largest, found[2])
        squares, power, nonfinite = squares + found[3], power + found[4], nonfinite + found[5]
    return weight.numel(), kept, largest, squares, power, nonfinite


@kernel
def _blocks(weight: Any, change: Any, scale: float, out: Any, left: Any) -> Any:
    """Of all full blocks: how many sums are changed by rounding, the largest error, sums of squared
    errors and sums. ``left``: whether a block still has to be done, written.
    """
    different, largest, squares, power = 0, 0.0, 0.0, 0.0
    for number in range(len(left)):
        changed, most, lost, strength = _block(
            weight, u64(number) * u64(_BLOCK), change, scale, out
        )
        left[number] = not (_LEAST < strength < _MOST and (changed == 0 or lost > _LEAST))
        if not left[number]:
            different += changed
            largest = max(largest, float(most))
            squares += float(lost)
            power += float(strength)
    return different, largest, squares, power


@_intrinsic
def _block(typing: Any, weight: Any, start: Any, change: Any, scale: Any, out: Any) -> Any:
    """A block's sums, written, and how many of them are changed, the largest error, and sums of
    squared errors and sums.
    """
    result = numba.types.Tuple((numba.types.int32, *(numba.types.float32,) * 3))
    to_half = out.dtype == numba.types.int16

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, begin, changes, scale_, made = arguments
        totals = [
            cgutils.alloca_once_value(b, ir.Constant(kind, None))
            for kind in (_WORDS, _WORDS, _SINGLES, _SINGLES)
        ]

        def at(array: Any, kind: Any, place: Any) -> Any:
            return block(context, b, array, kind, place, _LANES)

        steps = ir.Constant(begin.type, _BLOCK // _LANES)
        with cgutils.for_range(b, steps, intp=begin.type) as loop:
            place = b.add(begin, b.mul(loop.index, ir.Constant(begin.type, _LANES)))
            halves = b.zext(b.load(at(weights, weight, place), align=2), _WORDS)
            value = b.bitcast(b.shl(halves, like(halves, 16)), _SINGLES)
            added = b.load(at(changes, change, place), align=4)
            exact = b.fadd(value, b.fmul(added, repeat(b, scale_, added)))
            rounded = _nearest(b, exact) if to_half else exact
            target = at(made, out, place)
            if to_half:
                bits = b.lshr(b.bitcast(rounded, _WORDS), like(halves, 16))
                b.store(b.trunc(bits, ir.VectorType(ir.IntType(16), _LANES)), target, align=2)
            else:
                b.store(rounded, target, align=4)
            error = b.fsub(rounded, exact)
            size = b.and_(b.bitcast(error, _WORDS), like(halves, 0x7FFFFFFF))
            is_other = b.zext(b.icmp_unsigned("!=", size, like(size, 0)), _WORDS)
            count, most, lost, strength = (b.load(total) for total in totals)
            larger = b.select(b.icmp_unsigned(">", size, most), size, most)
            b.store(b.add(count, is_other), totals[0])
            b.store(larger, totals[1])
            b.store(b.fadd(lost, b.fmul(error, error)), totals[2])
            b.store(b.fadd(strength, b.fmul(exact, exact)), totals[3])
        count, most, lost, strength = (b.load(total) for total in totals)
        none = ir.Constant(ir.FloatType(), 0.0)
        found = [
            reduced(b, "add", count),
            b.bitcast(reduced(b, "umax", most), ir.FloatType()),
            *(reduced(b, "fadd", total, none) for total in (lost, strength)),
        ]
        return context.make_tuple(b, signature.return_type, found)

    return result(weight, start, change, numba.types.float32, out), emit


def _nearest(b: Any, values: Any) -> Any:
    """Finite float32 rounded to bfloat16, ties to even."""
    bits = b.bitcast(values, _WORDS)
    odd = b.and_(b.lshr(bits, like(bits, 16)), like(bits, 1))
    near = b.add(bits, b.add(odd, like(bits, 0x7FFF)))
    return b.bitcast(b.and_(near, like(bits, 0xFFFF0000)), _SINGLES)
