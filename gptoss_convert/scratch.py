"""Reused memory. Fresh pages are dear (a first touch can cost more than the work done in them)."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

PAGE = 4096


_pinning = False


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within it, new memory is such that a GPU copies from and to it at full speed."""
    global _pinning
    before, _pinning = _pinning, True
    try:
        yield
    finally:
        _pinning = before


def round_up(count: int, unit: int = PAGE) -> int:
    """The next multiple of ``unit``."""
    return -(-count // unit) * unit


def page_aligned(nbytes: int) -> Tensor:
    """A new uint8 tensor of at least ``nbytes`` bytes that starts on a page."""
    import torch

    if _pinning:
        return torch.empty(max(round_up(nbytes), PAGE), dtype=torch.uint8, pin_memory=True)
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    # the default is shared memory, which gets no huge pages
    pages = mmap.mmap(-1, max(round_up(nbytes), PAGE), flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages only costs speed
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Scratch:
    """A bump allocator over page-aligned memory. ``reset`` gives all of it back at once.

    What ``take`` returned stays valid until the next ``reset``. Not for several threads at once.

    Args:
        allocate: number of bytes -> flat uint8 tensor of at least that many.

    """

    def __init__(self, allocate: Callable[[int], Tensor] = page_aligned) -> None:
        self._allocate = allocate
        self._blocks: list[Tensor] = []
        self._used = 0
        self._demand = 0  # bytes taken and not given back
        self._most = 0  # the most of that since the last reset

    def take(self, nbytes: int) -> Tensor:
        """A uint8 tensor of ``nbytes`` bytes that starts on a page; its content is undefined."""
        if not self._blocks or self._used + nbytes > self._blocks[-1].numel():
            if not self._demand:  # nothing of the old one is in use, so never hold both
                self._blocks = []
            self._blocks.append(self._allocate(nbytes))
            self._used = 0
        start = self._used
        self._used = round_up(start + nbytes)
        self._demand += self._used - start
        self._most = max(self._most, self._demand)
        return self._blocks[-1][start : start + nbytes]

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's bytes (flat uint8) in new memory that starts on a page."""
        return self.take(tensor.numel()).copy_(tensor)

    def mark(self) -> tuple[int, int, int]:
        """A point to ``release`` to."""
        return len(self._blocks), self._used, self._demand

    def release(self, mark: tuple[int, int, int]) -> None:
        """Give back what was taken since ``mark``; of memory added for it, the last block."""
        blocks, used, demand = mark
        if len(self._blocks) > blocks + 1:
            return
        self._used = used if len(self._blocks) == blocks else 0
        self._demand = demand

    def reset(self) -> None:
        """Make all memory available again, in one block from the second time on."""
        if len(self._blocks) > 1:
            self._blocks = []
            self._blocks = [self._allocate(self._most)]
        self._used = self._demand = self._most = 0
