"""Where a conversion computes: on the CPU, or on a GPU beside it.

With a GPU, bytes are read into pinned memory that is used again and again, go to the GPU, are decoded
and rewritten there, and come back straight into the writers' pinned slots. Every worker has a stream
of its own, so that reading, copying both ways, computing and writing overlap.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from gptoss_convert import scratch
from gptoss_convert.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

NAMES = ("cpu", "cuda")
_LOCAL_RANKS = (
    "LOCAL_RANK",
    "SLURM_LOCALID",
)  # torchrun's and srun's number of a process on its node


class Device:
    """The CPU."""

    name = "cpu"

    def memory(self) -> scratch.Scratch:
        """Reused memory for what is computed."""
        return scratch.Scratch()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """What a worker thread's computing happens in."""
        yield

    def here(self, tensor: Tensor) -> Tensor:
        """What was read, where it is computed with."""
        return tensor

    def to_write(self, tensor: Tensor) -> Tensor:
        """What is handed to a writer, in a form whose bytes it can take."""
        return tensor


class Cuda(Device):
    """One GPU.

    Args:
        place: which.

    """

    name = "cuda"

    def __init__(self, place: torch.device) -> None:
        self._place = place

    def memory(self) -> scratch.Scratch:
        """On the GPU."""
        import torch

        def allocate(nbytes: int) -> Tensor:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._place)

        return scratch.Scratch(allocate)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The GPU, and a stream of this thread's."""
        import torch

        with torch.cuda.device(self._place), torch.cuda.stream(torch.cuda.Stream(self._place)):
            yield

    def here(self, tensor: Tensor) -> Tensor:
        """A copy on the GPU, made while the CPU goes on."""
        return tensor.to(self._place, non_blocking=True)

    def to_write(self, tensor: Tensor) -> Tensor:
        """In order, so that the writer's copies are few and long."""
        return tensor.contiguous()


def require_device(name: str | None) -> None:
    """Raise UsageError if a GPU is asked for and there is none."""
    if name != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no GPU it can use here; say --device cpu")


@contextlib.contextmanager
def working_on(name: str) -> Iterator[Device]:
    """The device of that name; host memory that is taken meanwhile is what it can reach fast.

    Of several GPUs a process takes the one of its number on its node.

    Raises:
        UsageError: there is none.

    """
    if name == "cpu":
        yield Device()
        return
    require_device(name)
    import torch

    number = next(
        (int(os.environ[n]) for n in _LOCAL_RANKS if os.environ.get(n, "").isdecimal()), 0
    )
    with scratch.pinned():
        yield Cuda(torch.device("cuda", number % torch.cuda.device_count()))
