"""First-fit decreasing: samples into packs, the longest first, each into the first pack it fits.

Never more than 11/9 of the fewest packs there can be, and 6/9 (Dósa 2007, "The tight bound of first
fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 1024  # packs


def first_fit_decreasing(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which samples each pack has.

    All samples of one length are placed at once: in the order of packs, each takes as many as fit, as
    one after the other would. Packs are looked at in blocks, and only those that have one that fits.

    Args:
        lengths: int64 ``[n]``, each from 1 to ``capacity``.
        capacity: of a pack.

    Returns:
        Numbers of samples, int64 ``[n]``, pack after pack, within a pack the longest first and equal
        ones by number; and where the packs begin and end in them, int64 ``[packs + 1]``.

    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    packs = _Packs(len(lengths), capacity)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = packs.fill(size, count)
        if left:
            packs.open(size, left)
    home = np.concatenate([*packs.homes, np.empty(0, np.int64)])
    by_pack = np.argsort(home, kind="stable")
    return order[by_pack], np.searchsorted(home[by_pack], np.arange(packs.count + 1))


class _Packs:
    """Those that are open, and what is free in them.

    Attributes:
        count: how many there are.
        homes: the pack of each sample placed, int64 pieces.

    """

    def __init__(self, most: int, capacity: int) -> None:
        self.count, self._capacity = 0, capacity
        blocks = -(-most // _BLOCK)
        self._free = np.zeros(blocks * _BLOCK, np.int64)
        self._most_free = np.zeros(blocks, np.int64)
        self.homes: list[NDArray[np.int64]] = []

    def fill(self, size: int, count: int) -> int:
        """Place samples of one length in packs that there are; how many are left."""
        block, width = 0, 1
        while count:
            fitting = self._most_free[block:] >= size
            ahead = int(fitting.argmax()) if len(fitting) else 0
            if not len(fitting) or not fitting[ahead]:
                break
            block += ahead
            count -= self._fill_blocks(block, width, size, count)
            block += width
            width *= 2  # where many are to be placed, few steps
        return count

    def _fill_blocks(self, block: int, width: int, size: int, count: int) -> int:
        first = block * _BLOCK
        free = self._free[first : first + width * _BLOCK]
        fitting = np.flatnonzero(free >= size)
        takes = np.diff(np.minimum(np.cumsum(free[fitting] // size), count), prepend=0)
        free[fitting] -= takes * size
        self.homes.append(np.repeat(fitting + first, takes))
        self._most_free[block : block + width] = free.reshape(-1, _BLOCK).max(axis=1)
        return int(takes.sum())

    def open(self, size: int, count: int) -> None:
        """Place samples of one length in packs of their own."""
        each = self._capacity // size
        new = -(-count // each)
        takes = np.full(new, each)
        takes[-1] = count - each * (new - 1)
        numbers = np.arange(self.count, self.count + new)
        self.homes.append(np.repeat(numbers, takes))
        self._free[numbers] = self._capacity - takes * size
        first, last = self.count // _BLOCK, (self.count + new - 1) // _BLOCK + 1
        blocks = self._free[first * _BLOCK : last * _BLOCK].reshape(-1, _BLOCK)
        self._most_free[first:last] = blocks.max(axis=1)
        self.count += new
