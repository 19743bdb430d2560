"""Invertible tensor rewrites between Hugging Face and Megatron.

``forward`` goes Hugging Face -> Megatron, ``inverse`` comes back, bit for bit. Both may return a
tensor in any shape whose row-major order is the declared one, so that a rewrite can stay a view
and cost no memory. ``shapes`` says what ``forward`` makes, without torch, so that planning is
instant; an op without it is asked on meta tensors. ``units`` says into how many equal slices
along dim 0 the rewrite may be cut, each slice rewritten on its own; an op without it is not cut.

Letters in comments: E experts, H hidden size, I intermediate size (one half of gate/up), G
key-value groups, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Parts = Sequence["Tensor"]


class Op(Protocol):
    """An invertible rewrite. Third parties may write their own."""

    def forward(self, parts: Parts) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor."""

    def inverse(self, tensor: Tensor) -> Parts:
        """The Megatron tensor -> Hugging Face tensors."""


def forward_shape(op: Op, shapes: Sequence[Shape]) -> Shape:
    """Shape of ``op.forward``'s result; raises ValueError if the inputs do not fit the op."""
    if (quick := getattr(op, "shapes", None)) is not None:
        return cast("Shape", quick(shapes))
    import torch

    try:
        return tuple(op.forward([torch.empty(s, device="meta") for s in shapes]).shape)
    except (RuntimeError, IndexError) as error:
        raise ValueError(str(error)) from error


def units(op: Op, shape: Shape) -> int:
    """Into how many equal slices along dim 0 the rewrite may be cut (``shape``: Megatron's)."""
    count = getattr(op, "units", None)
    return count(shape) if count and shape else 1


@dataclass(frozen=True)
class Copy:
    """One tensor, unchanged."""

    def forward(self, parts: Parts) -> Tensor:
        """[...] -> [...]."""
        return parts[0]

    def inverse(self, tensor: Tensor) -> Parts:
        """[...] -> [...]."""
        return (tensor,)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """The same."""
        return shapes[0]

    def units(self, shape: Shape) -> int:
        """Every row is its own."""
        return shape[0]


COPY = Copy()


@dataclass(frozen=True)
class Blocks(Copy):
    """One tensor, unchanged, whose rows come in ``count`` equal blocks that stay whole."""

    count: int

    def units(self, shape: Shape) -> int:
        """Every block is its own."""
        return self.count


@dataclass(frozen=True)
class PadVocab(Copy):
    """A vocabulary table whose stored Megatron form may have padding rows at the end.

    Written without padding (loaders pad by themselves); rows past ``rows`` are not read back.
    """

    rows: int


@dataclass(frozen=True)
class Drop:
    """A Hugging Face tensor that Megatron does not keep, and why."""

    reason: str

    def forward(self, parts: Parts) -> Tensor:
        """Never called: nothing is written."""
        raise NotImplementedError(self.reason)

    def inverse(self, tensor: Tensor) -> Parts:
        """Never called: nothing is written."""
        raise NotImplementedError(self.reason)


@dataclass(frozen=True)
class Transpose:
    """Swaps the last two dims: ``[..., A, B] <-> [..., B, A]``."""

    def forward(self, parts: Parts) -> Tensor:
        """[..., A, B] -> [..., B, A], a view."""
        return parts[0].transpose(-1, -2)

    def inverse(self, tensor: Tensor) -> Parts:
        """[..., B, A] -> [..., A, B], a view."""
        return (tensor.transpose(-1, -2),)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """Last two sizes swapped."""
        *lead, a, b = shapes[0]
        return (*lead, b, a)


@dataclass(frozen=True)
class QKV:
    """q, k, v <-> Megatron's ``linear_qkv``, whose rows go group by group: [its q heads, k, v].

    The order is megatron-core's ``SelfAttention.get_query_key_value_tensors``: per key-value
    group first its ``heads / groups`` query heads, then its key, then its value.
    """

    heads: int
    groups: int
    head_dim: int

    def forward(self, parts: Parts) -> Tensor:
        """[heads*D, ...], [G*D, ...], [G*D, ...] -> [G, (heads/G + 2)*D, ...]; a slice of groups too."""
        import torch

        q, k, v = (p.unflatten(0, (-1, n)) for p, n in zip(parts, self._rows(), strict=True))
        return torch.cat([q, k, v], dim=1)

    def inverse(self, tensor: Tensor) -> Parts:
        """[G*(heads/G + 2)*D, ...] -> q, k, v as views [G, rows, ...]."""
        grouped = tensor.unflatten(0, (-1, sum(self._rows())))
        return cast("Parts", grouped.split(self._rows(), dim=1))

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[(heads + 2*G)*D, ...]."""
        for name, shape, rows in zip("qkv", shapes, self._rows(), strict=True):
            if shape[0] != rows * self.groups:
                raise ValueError(f"{name} has {shape[0]} rows, not {rows * self.groups}")
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def units(self, shape: Shape) -> int:
        """Every group is its own."""
        return self.groups

    def _rows(self) -> list[int]:
        return [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]


@dataclass(frozen=True)
class Concat:
    """Equal tensors <-> one, stacked along dim 0; gate and up <-> a dense ``linear_fc1``."""

    count: int = 2

    def forward(self, parts: Parts) -> Tensor:
        """Count x [N, ...] -> [count*N, ...]."""
        import torch

        return torch.cat(list(parts), dim=0)

    def inverse(self, tensor: Tensor) -> Parts:
        """[count*N, ...] -> count views [N, ...]."""
        return tensor.chunk(self.count, dim=0)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[count*N, ...]."""
        if len(shapes) != self.count or len(set(shapes)) != 1:
            raise ValueError(f"{self.count} equal shapes are needed, not {list(map(list, shapes))}")
        return (self.count * shapes[0][0], *shapes[0][1:])


@dataclass(frozen=True)
class Experts:
    """All experts of one projection, expert axis first on both sides.

    Attributes:
        transpose: Hugging Face keeps ``[E, in, out]``; Megatron ``[E, out, in]``.
        interleaved: Hugging Face alternates gate and up along ``out`` (gate ``0::2``, up
            ``1::2``); Megatron stacks ``[gate; up]``.

    """

    transpose: bool = False
    interleaved: bool = False

    def forward(self, parts: Parts) -> Tensor:
        """[E, in, out] -> [E, out, in], or as a view [E, 2, out/2, in] when interleaved."""
        rows = parts[0].transpose(1, 2) if self.transpose else parts[0]
        return rows.unflatten(1, (-1, 2)).transpose(1, 2) if self.interleaved else rows

    def inverse(self, tensor: Tensor) -> Parts:
        """[E, out, in] -> [E, in, out], or as a view [E, in, out/2, 2] when interleaved."""
        rows = tensor.unflatten(1, (2, -1)).transpose(1, 2) if self.interleaved else tensor
        if self.transpose:
            rows = rows.movedim(-1, 1)
        return (rows,)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """Last two sizes swapped if transposed."""
        experts, *rest = shapes[0]
        out = rest[-1] if self.transpose else rest[0]
        if self.interleaved and out % 2:
            raise ValueError(f"gate and up alternate along an odd number of rows, {out}")
        return (experts, *(reversed(rest) if self.transpose else rest))

    def units(self, shape: Shape) -> int:
        """Every expert is its own."""
        return shape[0]


def split_row_major(tensor: Tensor, count: int) -> list[Tensor]:
    """Cut a tensor's row-major sequence into ``count`` equal runs, as views, whatever its shape.

    Raises:
        ValueError: if the runs would cross the tensor's dims.

    """
    if count == 1:
        return [tensor]
    size = tensor.shape[0] if tensor.dim() else 1
    if size % count == 0:
        return list(tensor.chunk(count, 0))
    if count % size == 0:
        return [run for part in tensor.unbind(0) for run in split_row_major(part, count // size)]
    raise ValueError(f"cannot cut {list(tensor.shape)} into {count} equal runs")
