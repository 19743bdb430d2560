"""Copying out of transposed views, at which plain strided copies are several times slower.

What makes those slow is moving two bytes at a time. So four neighbours are moved as one word of
eight bytes, in tiles that stay in the cache, and taken apart where they arrive::

    source, by columns of the target    abcd..  efgh..  ijkl..
    words turned around                 abcd efgh ijkl
    taken apart                         aei / bfj / cgk / dhl
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_LANES = 4  # elements of two bytes in a word
_COLUMNS, _WORDS = 4096, 16  # of a tile
_STRIP = 720  # columns turned at a time: their cache lines are used up before they are pushed out
_LEAST = 1 << 16  # elements; with fewer a strided copy is as good
_local = threading.local()


class _Words(NamedTuple):
    """A source's rows ``[head, stop)`` as words.

    Attributes:
        words: int64 ``[A, B, W]``; A and B are the target's columns.
        lanes: which elements of a word are rows.

    """

    head: int
    stop: int
    words: Any
    lanes: slice


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)``, for a target of the source's shape and dtype.

    Fast where the target is contiguous, elements have two bytes, and those of a column of the
    source, ``source[:, a]`` or ``source[:, a, b]``, stand side by side in memory, or with one
    between them.
    """
    if source.device.type != "cpu":
        target.copy_(source)
    elif source.numel() < _LEAST or source.itemsize != 2 or not target.is_contiguous():
        _plain(target, source)
    elif source.dim() > 2 and source.stride(0) > 2:
        for to, part in zip(target.unbind(0), source.unbind(0), strict=True):
            copy(to, part)
    elif (found := _find_words(source)) is None:
        _plain(target, source)
    else:
        _plain(target[: found.head], source[: found.head])
        _copy_words(target[found.head : found.stop], found)
        _plain(target[found.stop :], source[found.stop :])


def _plain(target: Tensor, source: Tensor) -> None:
    """By numpy: torch would spread it over threads, and they wait for the next one at full speed."""
    import numpy as np

    np.copyto(_integers(target), _integers(source))


def _integers(tensor: Tensor) -> Any:
    """As numpy's integers: it knows no bfloat16."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.itemsize]).numpy()


def _find_words(source: Tensor) -> _Words | None:
    """None if the source has no such columns."""
    import torch

    step, shape, strides = source.stride(0), source.shape[1:], source.stride()[1:]
    if step not in (1, 2) or len(shape) not in (1, 2) or any(s % _LANES for s in strides):
        return None
    lane = source.storage_offset() % _LANES
    head = 0 if lane < step else -((lane - _LANES) // step)  # rows before the first full word
    start = source.storage_offset() + head * step
    base = start - start % _LANES
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    there = (source.untyped_storage().nbytes() // 2 - base - reach) // _LANES
    each = _LANES // step
    count = min((source.shape[0] - head) // each, there)
    if count < 1:
        return None
    span = source.view(torch.int16).as_strided((reach + count * _LANES,), (1,), base)
    words = span.view(torch.int64).as_strided(
        (*shape, count), (*(s // _LANES for s in strides), 1), base // _LANES
    )
    words = words.view(len(words), -1, count) if len(shape) == 1 else words
    return _Words(head, head + count * each, words.numpy(), slice(start % _LANES, None, step))


def _copy_words(target: Tensor, source: _Words) -> None:
    import numpy as np

    columns, inner, count = source.words.shape
    rows = _integers(target).reshape(count, -1, columns, inner)
    most = max(1, _COLUMNS // inner)
    for left in range(0, columns, most):
        right = min(left + most, columns)
        for first in range(0, count, _WORDS):
            last = min(first + _WORDS, count)
            tile = _tile(last - first, right - left, inner)
            for place in range(left, right, _STRIP):
                strip = slice(place, min(place + _STRIP, right))
                into = tile[:, strip.start - left : strip.stop - left]
                for b in range(inner):
                    np.copyto(into[:, :, b], source.words[strip, b, first:last].T)
            lanes = tile.view(np.int16).reshape(*tile.shape, _LANES)[..., source.lanes]
            np.copyto(rows[first:last, :, left:right], lanes.transpose(0, 3, 1, 2))


def _tile(*shape: int) -> Any:
    """This thread's memory for a tile, int64."""
    import math

    import numpy as np

    count = math.prod(shape)
    memory = _local.__dict__.get("memory")
    if memory is None or len(memory) < count:
        memory = _local.memory = np.empty(max(count, _COLUMNS * _WORDS), np.int64)
    return memory[:count].reshape(shape)
