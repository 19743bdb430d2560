"""How two tensors differ: counted and summed piece by piece, told tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_convert import transpose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gptoss_convert.scratch import Scratch

_CHUNK = 1 << 18  # elements at a time: in float64 they fit the cache
_LEAST = 1e-30  # of a sum of squares; of a smaller one float32 may have lost too much
BLOCK = 32  # values of a block of MXFP4, along the last dim of the natural order


@dataclass(frozen=True)
class Difference:
    """Sums over a tensor, or over a piece of it; they add up.

    Errors are second less first, over the places where both are finite.

    Attributes:
        elements: how many.
        equal: those that are the same number, signs of zeros included; NaN equals NaN.
        largest: the largest absolute error.
        squares: sum of the squared errors.
        powers: sums of the squares of the first and of the second.
        product: sum of their products.
        nonfinite: how many of the first, and of the second, are NaN or infinite.
        blocks: runs of 32 along the last dim, where blocks of a codec run that way.
        equal_blocks: those in which all is equal.

    """

    elements: int = 0
    equal: int = 0
    largest: float = 0.0
    squares: float = 0.0
    powers: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0
    nonfinite: tuple[int, int] = (0, 0)
    blocks: int = 0
    equal_blocks: int = 0

    def __add__(self, other: Difference) -> Difference:
        def added(one: Any, two: Any, name: str) -> Any:
            if name == "largest":
                return max(one, two)
            return (one[0] + two[0], one[1] + two[1]) if isinstance(one, tuple) else one + two

        names = [f.name for f in dataclasses.fields(self)]
        return Difference(**{n: added(getattr(self, n), getattr(other, n), n) for n in names})

    @property
    def is_equal(self) -> bool:
        """Whether every element is."""
        return self.equal == self.elements

    @property
    def relative(self) -> float:
        """Root of the mean square of the errors, by that of the first; 0 where all is equal."""
        if self.squares == 0:
            return 0.0 if self.is_equal or self.nonfinite == (0, 0) else math.inf
        return math.sqrt(self.squares / self.powers[0]) if self.powers[0] else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two; None if one of them is zero."""
        if self.is_equal:
            return 1.0
        lengths = math.sqrt(self.powers[0]) * math.sqrt(self.powers[1])
        return self.product / lengths if lengths else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        relative = self.relative
        return {
            "elements": self.elements,
            "equal": self.equal,
            "max_error": self.largest,
            "relative_error": relative if math.isfinite(relative) else None,
            "cosine": self.cosine,
            "nonfinite": list(self.nonfinite),
            "blocks": self.blocks or None,
            "equal_blocks": self.equal_blocks if self.blocks else None,
        }


def difference(first: Tensor, second: Tensor, scratch: Scratch, *, blocks: bool) -> Difference:
    """Compare two tensors of one shape, of any floating-point types and strides.

    Args:
        first: of which the second may be a copy.
        second: what it is compared with.
        scratch: memory for chunks; given back.
        blocks: count runs of 32 along the last dim.

    """
    blocks = blocks and first.shape[-1] % BLOCK == 0
    total = Difference()
    for one, two in _chunks(first, second):
        mark = scratch.mark()
        total += _of_chunk(_flat(one, scratch), _flat(two, scratch), blocks=blocks)
        scratch.release(mark)
    return total


def _chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both cut alike along their first dims."""
    if first.numel() <= _CHUNK or first.dim() < 2:
        yield first, second
        return
    rows = _CHUNK // first[0].numel()
    if rows == 0:
        for pair in zip(first.unbind(0), second.unbind(0), strict=True):
            yield from _chunks(*pair)
        return
    yield from zip(first.split(rows), second.split(rows), strict=True)


def _flat(tensor: Tensor, scratch: Scratch) -> Tensor:
    """In row-major order, one-dimensional."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    room = scratch.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    transpose.copy(room, tensor)
    return room.view(-1)


def _of_chunk(one: Tensor, two: Tensor, *, blocks: bool) -> Difference:
    count = one.numel()
    runs = count // BLOCK if blocks else 0
    if one.dtype == two.dtype and _same_bits(one, two):
        wide = one.float()
        power = float(wide.dot(wide))
        if _LEAST < power < math.inf:  # float32 held it, so there is no NaN and no infinity
            powers = (power, power)
            return Difference(
                count, count, powers=powers, product=power, blocks=runs, equal_blocks=runs
            )
    x, y = one.double(), two.double()
    alike = (x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan()
    strange = int((~x.isfinite()).sum()), int((~y.isfinite()).sum())
    if strange != (0, 0):
        finite = x.isfinite() & y.isfinite()
        x, y = x.where(finite, 0), y.where(finite, 0)
    error = y - x
    return Difference(
        count,
        int(alike.sum()),
        float(error.abs().max()) if count else 0.0,
        float(error.dot(error)),
        (float(x.dot(x)), float(y.dot(y))),
        float(x.dot(y)),
        strange,
        runs,
        int(alike.view(-1, BLOCK).all(1).sum()) if runs else 0,
    )


def _same_bits(one: Tensor, two: Tensor) -> bool:
    import torch

    wide = all(
        t.numel() * t.itemsize % 8 == t.storage_offset() * t.itemsize % 8 == 0 for t in (one, two)
    )
    kind = torch.int64 if wide else getattr(torch, f"int{8 * one.itemsize}")
    return torch.equal(one.view(kind), two.view(kind))
