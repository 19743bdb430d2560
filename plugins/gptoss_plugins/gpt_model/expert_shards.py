"""How a stack of experts is named and cut in a distributed checkpoint.

Megatron stores every expert linear under one key with the axes (layer,) expert, row(, column); the
reader fetches whole stored chunks, so a checkpoint is cut into one chunk per expert, and per half
where the rows are ``[gate; up]``. Our module holds its experts in one tensor: a
``ShardedTensorFactory`` cuts it into views when a checkpoint is written or read, and puts the
pieces together afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Offset = tuple[int, int, int]  # axis, index on it, number of equal parts


@dataclass(frozen=True)
class ExpertRange:
    """Which experts a rank holds.

    Attributes:
        first: global number of the rank's first expert.
        count: how many it holds.
        total: how many there are.
        replica: the rank's place among those that hold the same experts.

    """

    first: int
    count: int
    total: int
    replica: int

    def offset(self, axis: int, local: int) -> Offset:
        """Place of local expert ``local`` on checkpoint axis ``axis``."""
        return (axis, self.first + local, self.total)

    @property
    def replica_id(self) -> tuple[int, int, int]:
        """Megatron's (pipeline, tensor, data) replica; only number 0 is written."""
        return (0, 0, self.replica)


def stack_factory(
    key: str, stack: Tensor, halves: int, experts: ExpertRange, layer: Sequence[Offset]
) -> ShardedTensorFactory:
    """The checkpoint's view of ``stack [experts, rows, ...]``.

    Args:
        key: name in the checkpoint.
        stack: a parameter, or optimizer state of its shape.
        halves: chunks per expert along the rows.
        experts: which experts the stack holds.
        layer: offsets of the axes before the expert axis; none, or that of the layer.

    """
    return ShardedTensorFactory(
        key, stack, _cutter(halves, experts, tuple(layer)), _joiner(stack), experts.replica_id
    )


def _cutter(
    halves: int, experts: ExpertRange, layer: tuple[Offset, ...]
) -> Callable[..., list[ShardedTensor]]:
    axis = len(layer)

    def piece(key: str, part: Tensor, local: int, half: int, replica_id: Any) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key,
            part,
            *layer,
            experts.offset(axis, local),
            (axis + 1, half, halves),
            replica_id=replica_id,
            prepend_axis_num=axis + 1,
        )

    @torch.no_grad()
    def cut(key: str, stack: Tensor, replica_id: Any, _: Any = None) -> list[ShardedTensor]:
        return [
            piece(key, part, local, half, replica_id)
            for local, expert in enumerate(stack)
            for half, part in enumerate(expert.chunk(halves))
        ]

    return cut


def _joiner(stack: Tensor) -> Callable[[list[Tensor]], Tensor]:
    shape = stack.shape  # the tensor itself must not be kept alive

    @torch.no_grad()
    def join(pieces: list[Tensor]) -> Tensor:
        if _adjoining(pieces):  # loaded in place: no second copy of the experts
            strides = torch.empty(shape, device="meta").stride()
            return pieces[0].as_strided(shape, strides, pieces[0].storage_offset())
        return torch.cat(pieces).view(shape)

    return join


def _adjoining(pieces: Sequence[Tensor]) -> bool:
    """Whether the pieces lie one after the other in one block of memory."""
    ends = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in pieces]
    together = all(one[1] == two[0] for one, two in pairwise(ends))
    memory = {p.untyped_storage().data_ptr() for p in pieces}
    return together and len(memory) == 1 and all(p.is_contiguous() for p in pieces)


def empty_extra_states(
    prefix: str, experts: ExpertRange, layer: Sequence[Offset]
) -> dict[str, Any]:
    """The ``_extra_state`` objects that stock expert linears write, and demand when they read.

    Transformer Engine keeps FP8 scales there; without FP8 they hold nothing.
    """
    return {
        f"{prefix}_extra_state{local}": make_sharded_object_for_checkpoint(
            None,
            f"{prefix}_extra_state",
            (*layer, experts.offset(len(layer), local)),
            replica_id=experts.replica_id,
        )
        for local in range(experts.count)
    }
