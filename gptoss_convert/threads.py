"""How many threads torch takes, for as long as others of ours are at work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def torch_threads(share: int | None = None) -> Iterator[None]:
    """Torch's threads are divided among so many of ours; it takes one, if None.

    Its threads wait for each other at full speed, so more of them than there are cores are slow.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if share is None else max(1, before // share))
    try:
        yield
    finally:
        torch.set_num_threads(before)
