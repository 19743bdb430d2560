"""Work spread over threads by rows, and memory that a thread uses again and again.

Torch's own threads split every operation, which costs more than it gains on operations that fit
the cache; and memory that is given back and taken anew costs page faults, more than the work in it.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Job = TypeVar("Job")
Result = TypeVar("Result")
_creating = threading.Lock()
_local = threading.local()


def spread(work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """``[work(job) for job in jobs]``, on as many threads as torch may use in this one."""
    count = min(torch.get_num_threads(), len(jobs))
    if count <= 1:
        return [work(job) for job in jobs]

    # Work on a GPU goes to the caller's stream from every thread, or it would not wait for its input.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def some(first: int) -> list[Result]:
        with torch.cuda.stream(stream):
            return [work(job) for job in jobs[first::count]]

    with _creating:
        pool = _pool(torch.get_num_threads())
    shares = list(pool.map(some, range(count)))
    return [shares[i % count][i // count] for i in range(len(jobs))]


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread each."""
    everyone = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread's count up on first use, and would do so later
        torch.set_num_threads(1)  # of the calling thread, and of those yet to be created
        everyone.wait()

    pool = ThreadPoolExecutor(count, "mxfp4", start)
    for _ in range(count):
        pool.submit(lambda: None)
    everyone.wait()
    torch.set_num_threads(count)
    return pool


def scratch(slot: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """This thread's memory number ``slot``, of undefined content; valid until asked for again."""
    count = math.prod(shape) * dtype.itemsize
    slots = _local.__dict__.setdefault("slots", {})
    if (slot, device) not in slots or slots[slot, device].numel() < count:
        slots[slot, device] = torch.empty(count, dtype=torch.uint8, device=device)
    memory: Tensor = slots[slot, device]
    return memory[:count].view(dtype).view(shape)


def contiguous(rows: Tensor) -> Tensor:
    """``rows`` as they are, or copied to scratch memory."""
    if rows.is_contiguous():
        return rows
    if rows.stride(-1) != 1:  # first run along the memory, then turn around within the cache
        across = rows.transpose(0, -1)
        rows = scratch(8, across.shape, rows.dtype, rows.device).copy_(across).transpose(0, -1)
    return scratch(9, rows.shape, rows.dtype, rows.device).copy_(rows)
