"""How the factors of an adapter are laid out by PEFT and by Megatron.

An adapter adds ``scale * B A`` to a weight ``[out, in]``, where A is ``[r, in]`` and B ``[out, r]``. B's
rows are the weight's, so the weight's own op carries them: it sees B as a weight of r inputs. A's
columns are the weight's inputs, which no op of a mapping table touches.

Letters: r rank, E experts, n the Hugging Face modules that one Megatron linear stands for. PEFT's form
of experts is that of its ``ParamWrapper``: A is ``[E*r, in]``, and column ``r'*E + e`` of B
``[out, r*E]`` is column r' of expert e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from gptoss_convert.errors import MismatchError
from gptoss_convert.ops import Op, Parts, Shape, Transpose, forward_shape, units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def swaps(op: Op) -> bool:
    """Whether Hugging Face keeps the weight of an op with its inputs before its outputs."""
    return isinstance(op, Transpose) or bool(getattr(op, "transpose", False))


def _require_equal(tensors: Sequence[Tensor] | Tensor, what: str) -> None:
    import torch

    if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise MismatchError(
            f"an adapter that {what} share is not the same for all; import it again"
        )


@dataclass(frozen=True)
class OneA:
    """A of a fused linear, which all of its modules have."""

    count: int

    def forward(self, parts: Parts) -> Tensor:
        """N x [r, in] -> [r, in].

        Raises:
            MismatchError: they differ.

        """
        _require_equal(parts, "several modules")
        return parts[0]

    def inverse(self, tensor: Tensor) -> Parts:
        """[r, in] -> n times the same."""
        return (tensor,) * self.count

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """The same."""
        if len(set(shapes)) != 1:
            raise ValueError(f"equal shapes are needed, not {list(map(list, shapes))}")
        return shapes[0]


@dataclass(frozen=True)
class StackedA:
    """A of a fused linear, made of those of its modules one below the other."""

    ranks: tuple[int, ...]

    def forward(self, parts: Parts) -> Tensor:
        """[r_i, in] each -> [sum of r_i, in]."""
        import torch

        return torch.cat(list(parts))

    def inverse(self, tensor: Tensor) -> Parts:
        """[sum of r_i, in] -> [r_i, in] each."""
        return cast("Parts", tensor.split([rank for rank in self.ranks if rank]))

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[sum of r_i, in]."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class BlockB:
    """B of a fused linear that goes with :class:`StackedA`: a block for each module, zeros elsewhere.

    Attributes:
        op: of the weight.
        rows: outputs of every module.
        ranks: of every module's adapter; 0 where it has none.

    """

    op: Op
    rows: tuple[int, ...]
    ranks: tuple[int, ...]

    def forward(self, parts: Parts) -> Tensor:
        """[out_i, r_i] of those modules that have one -> [out, sum of r_i], in any shape."""
        found = iter(parts)
        share = len(parts[0]) / next(n for n, r in zip(self.rows, self.ranks, strict=True) if r)
        blocks, start = [], 0
        for rows, rank in zip(self.rows, self.ranks, strict=True):
            block = parts[0].new_zeros((round(rows * share), sum(self.ranks)))
            if rank:
                block[:, start : start + rank] = next(found)
            blocks.append(block)
            start += rank
        return self.op.forward(blocks)

    def inverse(self, tensor: Tensor) -> Parts:
        """[out, sum of r_i] -> [out_i, r_i] of those modules that have one."""
        found, start = [], 0
        for rows, rank in zip(self.op.inverse(tensor), self.ranks, strict=True):
            if rank:
                found.append(rows[..., start : start + rank])
            start += rank
        return found

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[out, sum of r_i]."""
        wanted = [s for s in zip(self.rows, self.ranks, strict=True) if s[1]]
        if list(shapes) != wanted:
            raise ValueError(f"{list(map(list, wanted))} are needed, not {list(map(list, shapes))}")
        return forward_shape(self.op, [(rows, sum(self.ranks)) for rows in self.rows])

    def units(self, shape: Shape) -> int:
        """As the weight."""
        return units(self.op, shape)


@dataclass(frozen=True)
class ExpertA:
    """A of every expert."""

    experts: int

    def forward(self, parts: Parts) -> Tensor:
        """[E*r, in] -> [E, r, in]."""
        return cast("Tensor", parts[0].unflatten(0, (self.experts, -1)))

    def inverse(self, tensor: Tensor) -> Parts:
        """[E, r, in] -> [E*r, in]."""
        return (tensor.flatten(0, 1),)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[E, r, in]."""
        rows, inputs = shapes[0]
        return (self.experts, rows // self.experts, inputs)


@dataclass(frozen=True)
class ExpertB:
    """B of every expert.

    Attributes:
        op: of the weight.
        experts: how many there are.

    """

    op: Op
    experts: int

    def forward(self, parts: Parts) -> Tensor:
        """[out, r*E] -> [E, out, r], in any shape."""
        by_expert = parts[0].unflatten(1, (-1, self.experts)).movedim(2, 0)
        return self.op.forward([by_expert.mT if swaps(self.op) else by_expert])

    def inverse(self, tensor: Tensor) -> Parts:
        """[E, out, r] -> [out, r*E]."""
        (found,) = self.op.inverse(tensor)
        rank = tensor.shape[-1]
        if swaps(self.op):
            found = found.reshape(self.experts, rank, -1).permute(2, 1, 0)
        else:
            found = found.reshape(self.experts, -1, rank).permute(1, 2, 0)
        return (found.reshape(len(found), -1),)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[E, out, r]."""
        rows, columns = shapes[0]
        rank = columns // self.experts
        one = (rank, rows) if swaps(self.op) else (rows, rank)
        return forward_shape(self.op, [(self.experts, *one)])


@dataclass(frozen=True)
class SharedA:
    """A that all experts share; PEFT has it once for each."""

    experts: int

    def forward(self, parts: Parts) -> Tensor:
        """[E*r, in] -> [r, in].

        Raises:
            MismatchError: experts differ.

        """
        each = ExpertA(self.experts).forward(parts)
        _require_equal(each, "all experts")
        return each[0]

    def inverse(self, tensor: Tensor) -> Parts:
        """[r, in] -> [E*r, in]."""
        return (tensor.repeat(self.experts, 1),)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[r, in]."""
        return ExpertA(self.experts).shapes(shapes)[1:]


@dataclass(frozen=True)
class SharedB:
    """B that all experts share.

    Attributes:
        op: of the weight.
        experts: how many there are.

    """

    op: Op
    experts: int

    def forward(self, parts: Parts) -> Tensor:
        """[out, r*E] -> [out, r], in any shape.

        Raises:
            MismatchError: experts differ.

        """
        each = ExpertB(self.op, self.experts).forward(parts)
        _require_equal(each, "all experts")
        return each[0]

    def inverse(self, tensor: Tensor) -> Parts:
        """[out, r] -> [out, r*E]."""
        each = tensor.expand(self.experts, *tensor.shape)
        return ExpertB(self.op, self.experts).inverse(each)

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[out, r]."""
        return ExpertB(self.op, self.experts).shapes(shapes)[1:]


@dataclass(frozen=True)
class PadRank:
    """A factor with zeros behind its rank, which change nothing, to have the rank of all others.

    Attributes:
        op: of the factor.
        rank: its own.
        padded: as Megatron has it.
        dim: where the rank is, from the end: -2 in A, -1 in B.

    """

    op: Op
    rank: int
    padded: int
    dim: int

    def forward(self, parts: Parts) -> Tensor:
        """[.., r, ..] -> [.., padded, ..]."""
        import torch

        made = self.op.forward(parts)
        shape = list(made.shape)
        shape[self.dim] = self.padded - self.rank
        return torch.cat([made, made.new_zeros(shape)], self.dim)

    def inverse(self, tensor: Tensor) -> Parts:
        """[.., padded, ..] -> [.., r, ..]."""
        return self.op.inverse(tensor.narrow(self.dim, 0, self.rank))

    def shapes(self, shapes: Sequence[Shape]) -> Shape:
        """[.., padded, ..]."""
        found = list(forward_shape(self.op, shapes))
        found[self.dim] = self.padded
        return tuple(found)
