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


def finite(number: float) -> float | None:
    """The number, or None in place of NaN and infinity, for which JSON has no words."""
    return number if math.isfinite(number) else None


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
        clashes: places where one of them is, and the other is not the same.
        blocks: runs along the last dim, of the length of a codec's blocks; 0 if none were counted.
        equal_blocks: those in which all is equal.

    """

    elements: int = 0
    equal: int = 0
    largest: float = 0.0
    squares: float = 0.0
    powers: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0
    nonfinite: tuple[int, int] = (0, 0)
    clashes: int = 0
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
            return math.inf if self.clashes else 0.0
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
        return {
            "elements": self.elements,
            "equal": self.equal,
            "max_error": self.largest,
            "relative_error": finite(self.relative),
            "cosine": self.cosine,
            "nonfinite": list(self.nonfinite),
            "blocks": self.blocks or None,
            "equal_blocks": self.equal_blocks if self.blocks else None,
        }


def difference(first: Tensor, second: Tensor, scratch: Scratch, *, block: int = 0) -> Difference:
    """Compare two tensors of one shape, of any floating-point types and strides.

    Args:
        first: of which the second may be a copy.
        second: what it is compared with.
        scratch: memory for chunks; given back.
        block: count runs of so many elements along the last dim, which has a multiple of them;
            0 for none.

    """
    if first.dim() > 2:  # matrix by matrix, which bounds the memory
        pairs = zip(first.unbind(0), second.unbind(0), strict=True)
        return sum((difference(*pair, scratch, block=block) for pair in pairs), Difference())
    total, start = Difference(), scratch.mark()
    # A matrix that runs along its columns is turned around as a whole, which is fastest.
    rows = [t if t.dim() < 2 or t.stride(-1) == 1 else _copy(t, scratch) for t in (first, second)]
    for pair in _chunks(*rows):
        mark = scratch.mark()
        one, two = ((t if t.is_contiguous() else _copy(t, scratch)).view(-1) for t in pair)
        total += _of_chunk(one, two, block)
        scratch.release(mark)
    scratch.release(start)
    return total


def _copy(tensor: Tensor, scratch: Scratch) -> Tensor:
    """In row-major order."""
    room = scratch.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    transpose.copy(room, tensor)
    return room


def _chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of both at a time; a vector is one chunk."""
    if first.dim() < 2:
        yield first, second
        return
    rows = max(1, _CHUNK // first.shape[1])
    yield from zip(first.split(rows), second.split(rows), strict=True)


def _of_chunk(one: Tensor, two: Tensor, block: int) -> Difference:
    count = one.numel()
    runs = count // block if block else 0
    if max(one.itemsize, two.itemsize) <= 4 and (quick := _in_float32(one, two, runs)):
        return quick
    x, y = one.double(), two.double()
    alike = (x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan()
    strange, clashes = (int((~x.isfinite()).sum()), int((~y.isfinite()).sum())), 0
    if strange != (0, 0):
        whole = x.isfinite() & y.isfinite()
        clashes = int((~whole & ~alike).sum())
        x, y = x.where(whole, 0), y.where(whole, 0)
    error = y - x
    return Difference(
        count,
        int(alike.sum()),
        float(error.abs().max()) if count else 0.0,
        float(error.dot(error)),
        (float(x.dot(x)), float(y.dot(y))),
        float(x.dot(y)),
        strange,
        clashes,
        runs,
        int(alike.view(runs, -1).all(1).sum()) if runs else 0,
    )


def _in_float32(one: Tensor, two: Tensor, runs: int) -> Difference | None:
    """The same, several times as fast; None where float32 does not hold a sum of squares, as it does
    not of tiny numbers, huge ones, NaN and infinity.
    """
    count = one.numel()
    x = one.float()
    power = _held(x, x)
    if one.dtype != two.dtype:
        one, two = x, two.float()
    if power is not None and _same_bits(one, two):
        return Difference(
            count, count, powers=(power, power), product=power, blocks=runs, equal_blocks=runs
        )
    y = two.float()
    error = y - x
    other, squares = _held(y, y), _held(error, error)
    if power is None or other is None or squares is None:
        return None
    alike = _bits(one) == _bits(two)
    least, most = map(float, error.aminmax())
    return Difference(
        count,
        int(alike.sum()),
        max(-least, most),
        squares,
        (power, other),
        float(x.dot(y)),
        (0, 0),
        0,
        runs,
        int(alike.view(runs, -1).all(1).sum()) if runs else 0,
    )


def _held(one: Tensor, two: Tensor) -> float | None:
    """A sum of products, if float32 lost nothing of weight in it."""
    total = float(one.dot(two))
    return total if _LEAST < total < math.inf else None


def _same_bits(one: Tensor, two: Tensor) -> bool:
    import torch

    places = (n * t.itemsize % 8 for t in (one, two) for n in (t.numel(), t.storage_offset()))
    if any(places):
        return torch.equal(_bits(one), _bits(two))
    return torch.equal(one.view(torch.int64), two.view(torch.int64))


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.view(getattr(torch, f"int{8 * tensor.itemsize}"))
