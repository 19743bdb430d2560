"""By numba: tiles of 8 by 8 elements turned around in registers.

The tile is written out for LLVM's vectors, since it finds none in a loop that transposes.
"""

from __future__ import annotations

from typing import Any

import numba
import numba.extending
import numpy as np
from llvmlite import ir

_TILE = 8  # elements of two bytes: a vector that every CPU has, and whose shuffles are one step
_ROWS, _COLUMNS = 32, 576  # of a block: each column is a cache line, and all of them stay in cache
u64: Any = np.uint64  # for places: signed ones are checked for being negative


def copy_columns(target: Any, source: Any) -> None:
    """``target[:] = source``, both int16 ``[R, *columns]``.

    Args:
        target: contiguous.
        source: of any strides but that of dim 0, which is one or two elements.

    """
    step, *strides = (stride // source.itemsize for stride in source.strides)
    starts = np.zeros(1, np.uint64)
    for size, stride in zip(source.shape[1:], strides, strict=True):
        starts = (starts[:, None] + np.arange(size, dtype=np.uint64) * u64(stride)).reshape(-1)
    reach = 1 + sum((n - 1) * s for n, s in zip(source.shape, (step, *strides), strict=True))
    flat = np.lib.stride_tricks.as_strided(source, (reach,), (source.itemsize,))
    _copy_blocks(flat, u64(step), starts, target.reshape(len(target), -1))


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of a square of vectors. Each round shuffles its halves together, like cards."""
    half = _TILE // 2
    for _ in range(_TILE.bit_length() - 1):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [
            builder.shuffle_vector(
                *pair,
                _places([k + side for k in range(start, start + half) for side in (0, _TILE)]),
            )
            for pair in pairs
            for start in (0, half)
        ]
    return rows


def _places(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


def _tile(step: int) -> Any:
    """A function that copies a tile, whose columns have ``step`` elements from one to the next."""

    @numba.extending.intrinsic
    def tile(
        typing: Any,
        source: Any,
        row: Any,
        starts: Any,
        column: Any,
        target: Any,
        place: Any,
        width: Any,
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source_, row_, starts_, column_, target_, place_, width_ = arguments
            kinds = {source_: source, starts_: starts, target_: target}
            memory = {
                array: context.make_array(kind)(context, builder, array).data
                for array, kind in kinds.items()
            }
            vector = ir.VectorType(ir.IntType(16), _TILE)

            def at(array: Any, place: Any) -> Any:
                return builder.bitcast(builder.gep(memory[array], [place]), vector.as_pointer())

            def number(value: int) -> Any:
                return ir.Constant(place_.type, value)

            columns = []
            for k in range(_TILE):
                start = builder.load(
                    builder.gep(memory[starts_], [builder.add(column_, number(k))])
                )
                begin = builder.add(start, row_)
                loaded = builder.load(at(source_, begin), align=2)
                if step == 2:  # and not one element beyond the last
                    rest = builder.load(at(source_, builder.add(begin, number(_TILE - 1))), align=2)
                    evens = [*range(0, _TILE, 2), *range(_TILE + 1, 2 * _TILE, 2)]
                    loaded = builder.shuffle_vector(loaded, rest, _places(evens))
                columns.append(loaded)
            for made in _turned(builder, columns):
                builder.store(made, at(target_, place_), align=2)
                place_ = builder.add(place_, width_)
            return context.get_dummy_value()

        return numba.types.none(source, row, starts, column, target, place, width), emit

    return tile


_tile_of_1, _tile_of_2 = _tile(1), _tile(2)  # global, or the compiled loop would not be found again


def _kept(function: Any) -> Any:
    """Compile on first use, and keep that on disk if there is a place to write to."""
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:
        return numba.njit(function, nogil=True, error_model="numpy")


@_kept
def _copy_blocks(source: Any, step: int, starts: Any, target: Any) -> None:
    rows, columns = u64(target.shape[0]), u64(target.shape[1])
    flat = target.reshape(-1)
    full_rows, full_columns = rows - rows % u64(_TILE), columns - columns % u64(_TILE)
    for left in range(u64(0), full_columns, u64(_COLUMNS)):
        right = min(left + u64(_COLUMNS), full_columns)
        for top in range(u64(0), full_rows, u64(_ROWS)):
            for row in range(top, min(top + u64(_ROWS), full_rows), u64(_TILE)):
                for column in range(left, right, u64(_TILE)):
                    place = row * columns + column
                    if step == 1:
                        _tile_of_1(source, row, starts, column, flat, place, columns)
                    else:
                        _tile_of_2(source, row * step, starts, column, flat, place, columns)
    for row in range(rows):
        first = full_columns if row < full_rows else u64(0)
        for column in range(first, columns):
            flat[row * columns + column] = source[starts[column] + row * step]
