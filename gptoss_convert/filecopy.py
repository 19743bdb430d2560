"""Bytes that go from one file to another as they are, as one group of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.blockio import SLOT, BlockReader, BlockWriter
from gptoss_convert.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.checksums import Span

Stretch = tuple[int, int]  # first byte, number of bytes


class FileCopy:
    """The writer of a group without steps.

    Args:
        source: the file to copy from.
        target: the file to make.
        stretches: which bytes, one behind the other; None for all.
        tensors: where in the file made its tensors are.

    """

    def __init__(
        self,
        source: Path,
        target: Path,
        stretches: Sequence[Stretch] | None = None,
        tensors: Iterable[Span] = (),
    ) -> None:
        self._stretches = [(0, source.stat().st_size)] if stretches is None else stretches
        self._reader = BlockReader(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._writer = BlockWriter(target, sum(size for _, size in self._stretches), tensors)

    def write(self, name: str, rows: slice, tensor: Tensor) -> None:
        """Never called: there are no steps."""
        raise NotImplementedError(name)

    def close(self) -> None:
        """Copy, and put the file in place."""
        scratch = Scratch()
        for start, size in self._stretches:
            for at in range(start, start + size, SLOT):
                scratch.reset()
                count = min(SLOT, start + size - at)
                self._writer.append(self._reader.read(at, count, scratch))
        self._writer.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._writer.abort()
