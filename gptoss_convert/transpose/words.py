"""By numpy, in words.

Moving two bytes at a time is slow. So four neighbours are moved as one word of eight bytes, in tiles
that stay in the cache, and taken apart where they arrive::

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
_local = threading.local()


class Words(NamedTuple):
    """A source's rows ``[head, stop)`` as words.

    Attributes:
        words: int64 ``[A, B, W]``; A and B are the target's columns.
        lanes: which elements of a word are rows.

    """

    head: int
    stop: int
    words: Any
    lanes: slice


def find_words(source: Tensor) -> Words | None:
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
    return Words(head, head + count * each, words.numpy(), slice(start % _LANES, None, step))


def copy_words(target: Any, source: Words) -> None:
    """Into an int16 array of the shape of those rows, contiguous."""
    import numpy as np

    columns, inner, count = source.words.shape
    rows = target.reshape(count, -1, columns, inner)
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
