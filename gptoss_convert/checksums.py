"""Checksums of files and of the tensors in them, taken from the bytes as they pass.

They are XXH3, 128 bits, in hexadecimal: what ``xxh128sum FILE`` prints. It finds any accident, at a
fraction of what moving the bytes costs; it is no proof against somebody who means harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xxhash import xxh3_128

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

ALGORITHM = "xxh3-128"


@dataclass(frozen=True)
class Span:
    """A stretch of a file that is one tensor, or a part of one, by the name it goes by."""

    name: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class FileSum:
    """A file's size and checksum, and the checksum of every tensor in it, in order."""

    nbytes: int
    digest: str
    tensors: Mapping[Span, str] = field(default_factory=dict)


class Summing:
    """The checksums of a file that is seen block by block, from front to back.

    Args:
        spans: its tensors, which do not overlap.

    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._left = sorted(spans, key=lambda span: (span.offset, span.nbytes), reverse=True)
        self._file, self._tensor = xxh3_128(), xxh3_128()
        self._position = 0
        self._found: dict[Span, str] = {}

    def update(self, block: bytes | memoryview) -> None:
        """See the next bytes."""
        self._file.update(block)
        view, start = memoryview(block), self._position
        self._position = stop = start + len(view)
        while self._left and self._left[-1].offset < stop:
            span = self._left[-1]
            self._tensor.update(view[max(span.offset - start, 0) : span.end - start])
            if span.end > stop:
                break
            self._close(self._left.pop())

    def _close(self, span: Span) -> None:
        self._found[span] = self._tensor.hexdigest()
        self._tensor = xxh3_128()

    def total(self) -> FileSum:
        """What there is to say when all bytes have passed."""
        while self._left and self._left[-1].end <= self._position:
            self._close(self._left.pop())  # without a byte, at the very end
        if self._left:
            raise RuntimeError(f"{self._left[-1].name} is not whole in its file")
        return FileSum(self._position, self._file.hexdigest(), self._found)


Listener = Callable[["Path", FileSum], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, and in this thread, ``listener`` is told of files just before they are in place."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def current_listener() -> Listener | None:
    """Who is told of the files that are being written; nobody outside of a conversion."""
    return _listener.get()
