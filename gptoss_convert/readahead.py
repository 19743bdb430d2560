"""Reading the next piece while the present one is worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptoss_convert.scratch import Scratch

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    items: Sequence[T], read: Callable[[T, Scratch], R], memory: tuple[Scratch, Scratch]
) -> Iterator[tuple[T, R]]:
    """Each item with what was read for it, while the next one's is being read.

    What was read is valid until the next one is asked for.

    Args:
        items: in order.
        read: gets an item, and memory that is all free.
        memory: taken in turn.

    """

    def start(index: int) -> Future[R]:
        scratch = memory[index % 2]
        scratch.reset()
        return reader.submit(read, items[index], scratch)

    with ThreadPoolExecutor(1, "read") as reader:
        ahead = start(0) if items else None
        for index, item in enumerate(items):
            assert ahead is not None
            found = ahead.result()
            if index + 1 < len(items):
                ahead = start(index + 1)
            yield item, found
