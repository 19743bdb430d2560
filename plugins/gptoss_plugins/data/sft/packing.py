"""First-fit decreasing: samples into packs, the longest first, each into the first pack it fits.

Never more than 11/9 of the fewest packs there can be, and 6/9 (Dósa 2007, "The tight bound of first
fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def first_fit_decreasing(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which samples each pack has.

    All samples of one length are placed at once: in the order of packs, each takes as many as fit, as
    one after the other would. So the work is that of looking at the open packs once for each length
    there is; half of all, those above half the capacity, need no look.

    Args:
        lengths: int64 ``[n]``, each from 1 to ``capacity``.
        capacity: of a pack.

    Returns:
        Numbers of samples, int64 ``[n]``, pack after pack, within a pack the longest first and equal
        ones by number; and where the packs begin and end in them, int64 ``[packs + 1]``.

    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    home = np.empty(len(lengths), np.int64)  # of order's samples
    free = np.empty(len(lengths), np.int64)  # of packs
    open_ = np.empty(0, np.int64)  # packs that take the shortest sample, by number
    packs = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        if len(open_):
            fitting = open_[free[open_] >= size]
            takes = np.diff(np.minimum(np.cumsum(free[fitting] // size), count), prepend=0)
            found = int(takes.sum())
            home[placed : placed + found] = np.repeat(fitting, takes)
            free[fitting] -= takes * size
            placed, left = placed + found, count - found
        if left:
            each = capacity // size
            new = -(-left // each)
            takes = np.full(new, each)
            takes[-1] = left - each * (new - 1)
            numbers = np.arange(packs, packs + new)
            home[placed : placed + left] = np.repeat(numbers, takes)
            free[numbers] = capacity - takes * size
            packs, placed = packs + new, placed + left
            open_ = np.concatenate([open_, numbers])
        open_ = open_[free[open_] >= sizes[0]]
    by_pack = np.argsort(home, kind="stable")
    edges = np.searchsorted(home[by_pack], np.arange(packs + 1))
    return order[by_pack], edges
