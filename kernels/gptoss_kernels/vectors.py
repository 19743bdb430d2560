"""What kernels compiled by numba are made of where loops would not do: LLVM's vectors.

From loops, numba would widen values to 64 bits, and LLVM unroll them into scalar steps before it
looks for vectors. On a CPU with shorter vectors LLVM splits these.

Compiled kernels are kept on disk for as long as their own file is the same: change that, too.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir


def kernel(function: Any) -> Any:
    """Compile on first use, and keep that on disk if there is a place to write to."""
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:
        return numba.njit(function, nogil=True, error_model="numpy")


def block(context: Any, builder: Any, array: Any, kind: Any, start: Any, count: int) -> Any:
    """The address of ``count`` items of an array, taken as one vector."""
    items = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(kind.dtype), count)
    return builder.bitcast(builder.gep(items, [start]), vector.as_pointer())


def like(vector: Any, number: float) -> Any:
    """A vector of the same type, of one number."""
    return ir.Constant(vector.type, [number] * vector.type.count)


def repeat(builder: Any, number: Any, vector: Any) -> Any:
    """A value as a vector of a vector's type."""
    once = builder.insert_element(ir.Constant(vector.type, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(once, once, places([0] * vector.type.count))


def places(numbers: list[int]) -> Any:
    """Which elements of two vectors a shuffle takes."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), numbers)


def reduced(builder: Any, name: str, vector: Any, *first: Any) -> Any:
    """A vector's elements put together by ``llvm.vector.reduce``, in any order."""
    kind = vector.type.element
    is_float = isinstance(kind, ir.FloatType)
    letter = "f32" if is_float else f"i{kind.width}"
    function = builder.module.declare_intrinsic(
        f"llvm.vector.reduce.{name}.v{vector.type.count}{letter}",
        (),
        ir.FunctionType(kind, [*(value.type for value in first), vector.type]),
    )
    flags = ("reassoc", "nnan") if is_float else ()
    return builder.call(function, [*first, vector], fastmath=flags)
