"""The parameters of a running model, spread over its ranks, as the mapping table's whole tensors.

Both ways go by ``layout.pieces``, the arithmetic that cuts files, and not by megatron-core's own
description of its shards: what is gathered here and loaded by megatron-core was cut by two programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gptoss_convert.errors import ConfigError
from gptoss_convert.layout import Layout, Parameter, Piece, Rank, join, pieces, take
from gptoss_plugins.megatron.legacy.names import LOCAL_GROUPED, stored_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch import Tensor

    from gptoss_convert.stages import Chunk
    from gptoss_convert.types import Resharder


@dataclass(frozen=True)
class LiveModel:
    """This rank's part of a model.

    Attributes:
        chunks: what it has of the layers, with the modules.
        layout: of all ranks.
        layers: how many the model has.
        resharders: how each axis cuts.

    """

    chunks: Sequence[tuple[Chunk, GPTModel]]
    layout: Layout
    layers: int
    resharders: Mapping[str, Resharder]

    def whole(self, parameter: Parameter) -> Tensor | None:
        """A parameter from all ranks that have a part of it; on rank 0, and None elsewhere.

        All ranks call this together, with the same parameters in the same order.
        """
        me, found = dist.get_rank(), []
        for piece in pieces(parameter, self.layout, self.resharders):
            owner = self._first_with(piece, parameter)
            if me == owner:
                mine = self._local(parameter)
                if owner == 0:
                    found.append((piece, mine))
                else:
                    dist.send(mine.contiguous(), 0)
            elif me == 0:
                room = torch.empty(piece.shape, dtype=self._dtype, device=self._device)
                dist.recv(room, owner)
                found.append((piece, room))
        return join(found, parameter) if me == 0 else None

    def fill(self, parameter: Parameter, whole: Tensor) -> None:
        """Take this rank's part of a whole parameter, if it has one."""
        me = coordinates(dist.get_rank(), dist.get_world_size(), self.layout)
        if not any(chunk.has(parameter) for chunk, _ in self.chunks):
            return
        for piece in pieces(parameter, self.layout, self.resharders):
            if piece.is_on(me):
                with torch.no_grad():
                    self._local(parameter).copy_(take(whole, piece.box))

    def _first_with(self, piece: Piece, parameter: Parameter) -> int:
        world = dist.get_world_size()
        (chunk,) = (c for c in self.layout.chunks(self.layers) if c.has(parameter))
        places = (coordinates(number, world, self.layout) for number in range(world))
        return next(
            number for number, at in enumerate(places) if at.pp == chunk.pp and piece.is_on(at)
        )

    def _local(self, parameter: Parameter) -> Tensor:
        """This rank's part, as the module has it."""
        chunk, model = next(c for c in self.chunks if c[0].has(parameter))
        layer = None if parameter.layer is None else parameter.layer - chunk.first
        (name,) = stored_names(parameter.name, layer, LOCAL_GROUPED, 0)
        found: Tensor = dict(model.named_parameters())[name].data
        return found

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.chunks[0][1].parameters()).dtype
        return dtype

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.chunks[0][1].parameters()).device
        return device


def coordinates(number: int, world: int, layout: Layout) -> Rank:
    """A rank's place; in a world larger than the layout needs, every stage's ranks are repeated."""
    stage, within = divmod(number, world // layout.pp)
    each = layout.ranks_per_stage
    return list(layout.coordinates())[stage * each + within % each]


def require_world(layout: Layout, world: int) -> None:
    """Raise ConfigError unless the ranks there are make up the layout."""
    if layout.etp > 1:
        raise ConfigError(
            f"--etp {layout.etp}: megatron-core computes no experts with biases under expert tensor "
            f"parallelism; leave --etp out"
        )
    if world % layout.world:
        raise ConfigError(
            f"{layout} needs {layout.world} processes, or a multiple of that, and there are {world}; "
            f"start them with python -m torch.distributed.run --nproc_per_node={layout.world}"
        )
