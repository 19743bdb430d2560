"""Reading rows of a parameter from the pieces that ranks' files hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import itemsize, torch_dtype
from gptoss_convert.errors import MismatchError
from gptoss_convert.layout import put
from gptoss_convert.types import TensorSpec
from gptoss_plugins.megatron.torchzip import view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from gptoss_convert.layout import Ranges
    from gptoss_convert.scratch import Scratch
    from gptoss_plugins.megatron.legacy.rankfile import RankFile, StoredTensor


@dataclass(frozen=True)
class Part:
    """A piece of a parameter in one file: one tensor, or one per expert.

    Attributes:
        file: the file.
        tensors: one that is the piece, or its experts in order.
        apart: whether they are experts one by one.

    """

    file: RankFile
    tensors: tuple[StoredTensor, ...]
    apart: bool

    @property
    def spec(self) -> TensorSpec:
        """Of the piece."""
        first = self.tensors[0].spec
        return TensorSpec((len(self.tensors), *first.shape), first.dtype) if self.apart else first

    def read(self, start: int, stop: int, scratch: Scratch) -> Iterator[Tensor]:
        """Rows ``[start, stop)`` of the piece, in runs that are stored together."""
        if self.apart:
            for expert in self.tensors[start:stop]:
                yield self._rows(expert, (0, expert.spec.shape[0]), scratch)[None]
        else:
            yield self._rows(self.tensors[0], (start, stop), scratch)

    def _rows(self, tensor: StoredTensor, rows: tuple[int, int], scratch: Scratch) -> Tensor:
        shape, at = tensor.spec.shape, self.file.locate(tensor)
        offsets = (rows[0], *(0 for _ in shape[1:])) if shape else ()
        sizes = (rows[1] - rows[0], *shape[1:]) if shape else ()
        return view(self.file.reader, at, offsets, sizes, scratch)


@dataclass(frozen=True)
class Shared:
    """A piece, and its part in every file that has it, all of which must be equal."""

    box: tuple[Ranges, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of the whole that are consecutive in a piece: where they are in both."""

    piece: Shared
    start: int
    row: int
    count: int


@dataclass(frozen=True)
class Joined:
    """A parameter and its pieces.

    Attributes:
        name: the parameter.
        spec: of the whole; a vocabulary with its padding.
        pieces: all different ones.

    """

    name: str
    spec: TensorSpec
    pieces: tuple[Shared, ...]

    def read(self, rows: slice | None, scratch: Scratch) -> Tensor:
        """Rows of the whole, all if None."""
        first, stop = 0, 1
        if self.spec.shape:
            first, stop, _ = (rows or slice(None)).indices(self.spec.shape[0])
        runs = list(self._runs(first, stop))
        inner = tuple(((0, size),) for size in self.spec.shape[1:])
        if len(runs) == 1 and runs[0].piece.box[1:] == inner and not runs[0].piece.parts[0].apart:
            return next(self._agreed(runs[0], scratch))
        shape = (stop - first, *self.spec.shape[1:])
        dtype = self.spec.dtype
        flat = scratch.take(math.prod(shape) * itemsize(dtype)).view(torch_dtype(dtype))
        whole, mark = flat.view(shape), scratch.mark()
        for run in runs:
            at = run.start - first
            for tensor in self._agreed(run, scratch):
                put(whole, (((at, at + len(tensor)),), *run.piece.box[1:]), tensor)
                at += len(tensor)
                scratch.release(mark)
        return whole

    def _runs(self, first: int, stop: int) -> Iterator[_Run]:
        """What the pieces have of rows ``[first, stop)``."""
        for piece in self.pieces:
            row = 0
            for start, end in piece.box[0] if piece.box else ((0, 1),):
                low, high = max(start, first), min(end, stop)
                if high > low:
                    yield _Run(piece, low, row + low - start, high - low)
                row += end - start

    def _agreed(self, run: _Run, scratch: Scratch) -> Iterator[Tensor]:
        """A run's tensors from the first file that has them, compared with all others that do."""
        first, *others = run.piece.parts
        rows = (run.row, run.row + run.count)
        again = [other.read(*rows, scratch) for other in others]
        for tensor in first.read(*rows, scratch):
            mark = scratch.mark()
            for other, reading in zip(others, again, strict=True):
                if not _same(tensor, next(reading)):
                    raise MismatchError(
                        f"{self.name}: differs between {first.file.path} and {other.file.path}, "
                        f"which must hold the same; the ranks drifted apart in training or a file "
                        f"is of another checkpoint, take one whose files agree"
                    )
                scratch.release(mark)
            yield tensor


def _same(one: Tensor, two: Tensor) -> bool:
    """Bit by bit: a NaN is equal to itself."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.element_size()]
    return torch.equal(one.view(kind), two.view(kind))


def same_form(parts: Sequence[Part]) -> bool:
    """Whether all files have their parts in one type, and experts together or one by one."""
    return len({(part.spec.dtype, part.apart) for part in parts}) == 1
