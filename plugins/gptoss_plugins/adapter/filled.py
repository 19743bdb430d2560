"""Adapters in PEFT's form, brought to what all layers have in common: one rank, one scale, one set of names.

Letters: r rank, E experts (1 of a module).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from gptoss_convert.types import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.scratch import Scratch
    from gptoss_convert.types import TensorSource


class Made(NamedTuple):
    """A factor, and how it comes about.

    Attributes:
        spec: of it.
        make: reads what there is, and makes it.
        stored: its name in the file, if it is there as it is.

    """

    spec: TensorSpec
    make: Callable[[], Tensor]
    stored: str | None = None


class Pair(NamedTuple):
    """Both factors of a layer."""

    a: Made
    b: Made

    @property
    def specs(self) -> tuple[TensorSpec, TensorSpec]:
        """Theirs."""
        return self.a.spec, self.b.spec


def stored(source: TensorSource, a: str, b: str) -> Pair:
    """Factors as they are in the file."""
    specs = source.specs()
    return Pair(
        Made(specs[a], lambda: source.read(a), a), Made(specs[b], lambda: source.read(b), b)
    )


def zeros(rows: int, inputs: int, columns: int, dtypes: Sequence[str]) -> Pair:
    """Of a layer without an adapter: A ``[columns, inputs]``, B ``[rows, columns]``."""
    from gptoss_convert.dtypes import torch_dtype

    def nothing(spec: TensorSpec) -> Made:
        import torch

        return Made(spec, lambda: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)))

    a, b = TensorSpec((columns, inputs), dtypes[0]), TensorSpec((rows, columns), dtypes[1])
    return Pair(nothing(a), nothing(b))


def padded(pair: Pair, experts: int, rank: int) -> Pair:
    """With a higher rank: zeros behind A's rows of each expert, and behind B's columns, where the rank is
    the slower axis.
    """

    def pad_a() -> Tensor:
        each = pair.a.make().unflatten(0, (experts, -1))
        made = each.new_zeros((experts, rank, each.shape[2]))
        made[:, : each.shape[1]] = each
        return cast("Tensor", made.flatten(0, 1))

    def pad_b() -> Tensor:
        b = pair.b.make()
        made = b.new_zeros((len(b), rank * experts))
        made[:, : b.shape[1]] = b
        return made

    a, b = pair.specs
    return Pair(
        Made(replace(a, shape=(rank * experts, a.shape[1])), pad_a),
        Made(replace(b, shape=(b.shape[0], rank * experts)), pad_b),
    )


def scaled(pair: Pair, factor: float) -> Pair:
    """With B multiplied, in float32 at least."""
    spec = wide(pair.b.spec)

    def scale() -> Tensor:
        b = pair.b.make()
        return (b if b.dtype.itemsize > 4 else b.float()) * factor

    return Pair(pair.a, Made(spec, scale))


def turned(pair: Pair, experts: int) -> Pair:
    """A and B of the transposed weights: of A ``[E*r, in]`` and B ``[out, r*E]``, each is made of the other."""

    def of_b() -> Tensor:
        each = pair.b.make().unflatten(1, (-1, experts))
        return cast("Tensor", each.permute(2, 1, 0).flatten(0, 1))

    def of_a() -> Tensor:
        each = pair.a.make().unflatten(0, (experts, -1))
        return cast("Tensor", each.permute(2, 1, 0).flatten(1))

    a, b = (replace(spec, shape=spec.shape[::-1]) for spec in pair.specs)
    return Pair(Made(b, of_b), Made(a, of_a))


def wide(spec: TensorSpec) -> TensorSpec:
    """In float32, if it is in half precision."""
    return replace(spec, dtype="F32") if spec.dtype in ("BF16", "F16") else spec


class Filled:
    """A source some of whose tensors are made.

    Args:
        source: of the others.
        made: by name.
        is_wide: offer all that is in half precision as float32, for some had to be multiplied, and would be
            rounded to that again.

    """

    def __init__(self, source: TensorSource, made: Mapping[str, Made], *, is_wide: bool) -> None:
        self._source, self._made, self._is_wide = source, made, is_wide

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Those that are there, and those that are made."""
        specs = {**self._source.specs(), **{name: made.spec for name, made in self._made.items()}}
        return {name: wide(spec) for name, spec in specs.items()} if self._is_wide else specs

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The tensor, or ``rows`` of its dim 0."""
        if (made := self._made.get(name)) is None:
            found = self._source.read(name, rows, scratch)
        else:
            found = made.make() if rows is None else made.make()[rows]
        return found.float() if self._is_wide and found.dtype.itemsize < 4 else found
