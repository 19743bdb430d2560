"""Files that are made of items, one behind the other: bytes around each piece of tensor data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.checksums import Span
from gptoss_convert.ops import split_row_major

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.blockio import BlockWriter
    from gptoss_convert.types import TensorSpec

_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class Item:
    """A stretch of a file.

    Attributes:
        offset: where it begins; zeros fill what is left before it.
        head: what goes before the data.
        data_bytes: length of the data that is handed in.
        padding: how many zero bytes follow it, which nobody hands in.
        tail: what goes behind that.
        name: of the tensor, or the part of one, that data and padding are.

    """

    offset: int
    head: bytes = b""
    data_bytes: int = 0
    padding: int = 0
    tail: bytes = b""
    name: str = ""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + len(self.head) + self.data_bytes + self.padding + len(self.tail)


def spans(items: Mapping[str, Sequence[Item]]) -> Iterable[Span]:
    """Where in a file of items its tensors are."""
    for item in (item for found in items.values() for item in found):
        if item.name:
            start = item.offset + len(item.head)
            yield Span(item.name, start, item.data_bytes + item.padding)


class ItemFile:
    """The writer of a file of items.

    Args:
        writer: of the file.
        items: of every output, in the order of the file; outputs without data may be among them.
        specs: shapes of the outputs as they are written.

    """

    def __init__(
        self,
        writer: BlockWriter,
        items: Mapping[str, Sequence[Item]],
        specs: Mapping[str, TensorSpec],
    ) -> None:
        self._writer = writer
        self._row_bytes = {n: s.nbytes // s.shape[0] if s.shape else 0 for n, s in specs.items()}
        self._taken = dict.fromkeys(items, 0)  # bytes of each output so far
        due = [(name, item) for name, found in items.items() for item in found]
        self._left = due[::-1]
        self._missing = 0  # bytes of data the item under way still needs

    def write(self, name: str, rows: slice, tensor: Tensor) -> None:
        """Take the next rows of an output."""
        if rows.start * self._row_bytes[name] != self._taken[name]:
            raise RuntimeError(f"{name} came from row {rows.start} on, out of order")
        if self._missing and self._left[-1][0] != name:
            raise RuntimeError(f"{name} came before {self._left[-1][0]} was whole")
        self._taken[name] += tensor.numel() * tensor.element_size()
        self._spread(name, tensor)

    def _spread(self, name: str, tensor: Tensor) -> None:
        """Spread a piece over the items it covers, or continue the item it is part of."""
        nbytes = tensor.numel() * tensor.element_size()
        room = self._missing or self._next(name)
        if nbytes <= room:
            self._append(tensor, nbytes)
        elif nbytes % room == 0:
            for part in split_row_major(tensor, nbytes // room):
                self._missing = self._missing or self._next(name)
                self._append(part, room)
        else:  # a piece across the end of an item that was cut for its size
            count = room // (nbytes // tensor.shape[0])
            self._spread(name, tensor[:count])
            self._spread(name, tensor[count:])

    def _next(self, name: str) -> int:
        """Begin the next item with data, which must be of this output; how much data it takes."""
        self._without_data()
        if not self._left or self._left[-1][0] != name:
            raise RuntimeError(f"{name} is not what is due")
        item = self._left[-1][1]
        self._begin(item)
        self._missing = item.data_bytes
        return self._missing

    def _without_data(self) -> None:
        while self._left and not self._left[-1][1].data_bytes and not self._missing:
            self._begin(self._left[-1][1])
            self._end(self._left.pop()[1])

    def _begin(self, item: Item) -> None:
        self._zeros(item.offset - self._writer.position)
        self._writer.require(item.offset, "an item")
        self._writer.append_bytes(item.head)

    def _append(self, part: Tensor, nbytes: int) -> None:
        if nbytes > self._missing:
            raise RuntimeError(f"{nbytes} bytes came where {self._missing} were due")
        self._writer.append(part)
        self._missing -= nbytes
        if not self._missing:
            self._end(self._left.pop()[1])

    def _end(self, item: Item) -> None:
        self._zeros(item.padding)
        self._writer.append_bytes(item.tail)

    def _zeros(self, count: int) -> None:
        while count > 0:
            self._writer.append_bytes(memoryview(_ZEROS)[: min(count, len(_ZEROS))])
            count -= len(_ZEROS)

    def close(self) -> None:
        """Put the file in place."""
        self._without_data()
        if self._missing or self._left:
            self.abort()
            raise RuntimeError("a data file was closed before all of it was written")
        self._writer.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._writer.abort()
