"""The parameters of a running model, spread over its ranks, as the mapping table's whole tensors.

Both ways go by ``layout.pieces``, the arithmetic that cuts files, and not by megatron-core's own
description of its shards: what is gathered here and loaded by megatron-core was cut by two programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_convert.layout import Layout, Parameter, Piece, join, pieces, take
from gptoss_plugins.gpt_model.build import build_gpt_model
from gptoss_plugins.gpt_model.world import coordinates
from gptoss_plugins.megatron.legacy.names import LOCAL_GROUPED, stored_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch import Tensor

    from gptoss_convert.registry import Registry
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
                mine = self.local(parameter)
                if owner == 0:
                    found.append((piece, mine))
                else:
                    dist.send(mine.contiguous(), 0)
            elif me == 0:
                room = torch.empty(piece.shape, dtype=self._dtype, device=self.place)
                dist.recv(room, owner)
                found.append((piece, room))
        return join(found, parameter) if me == 0 else None

    @property
    def models(self) -> list[GPTModel]:
        """The modules, in order."""
        return [model for _, model in self.chunks]

    def mine(self, parameter: Parameter) -> Piece | None:
        """This rank's piece of a parameter; None if it has none of it."""
        if not any(chunk.has(parameter) for chunk, _ in self.chunks):
            return None
        me = coordinates(dist.get_rank(), dist.get_world_size(), self.layout)
        (piece,) = (p for p in pieces(parameter, self.layout, self.resharders) if p.is_on(me))
        return piece

    @torch.no_grad()
    def fill(self, parameter: Parameter, piece: Piece, rows: Tensor, first: int = 0) -> None:
        """Copy what this rank needs of some rows to its place.

        Args:
            parameter: which.
            piece: this rank's of it.
            rows: ``[count, *parameter.shape[1:]]``, of any dtype and device.
            first: where they begin along the parameter's dim 0.

        """
        local, count, at = self.local(parameter), len(rows), 0
        for start, stop in piece.box[0]:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                box = (((low - first, high - first),), *piece.box[1:])
                local.narrow(0, at + low - start, high - low).copy_(take(rows, box))
            at += stop - start

    def _first_with(self, piece: Piece, parameter: Parameter) -> int:
        world = dist.get_world_size()
        (chunk,) = (c for c in self.layout.chunks(self.layers) if c.has(parameter))
        places = (coordinates(number, world, self.layout) for number in range(world))
        return next(
            number for number, at in enumerate(places) if at.pp == chunk.pp and piece.is_on(at)
        )

    def local(self, parameter: Parameter) -> Tensor:
        """This rank's part of a parameter that it has, as the module has it."""
        chunk, model = next(c for c in self.chunks if c[0].has(parameter))
        layer = None if parameter.layer is None else parameter.layer - chunk.first
        canonical = parameter.name.replace(".experts.experts.", ".experts.")  # a shared adapter's
        (name,) = stored_names(canonical, layer, LOCAL_GROUPED, 0)
        found: Tensor = dict(model.named_parameters())[name].data
        return found

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.chunks[0][1].parameters()).dtype
        return dtype

    @property
    def place(self) -> torch.device:
        """This rank's device."""
        device: torch.device = next(self.chunks[0][1].parameters()).device
        return device


def build_live(
    fields: Mapping[str, Any],
    layout: Layout,
    registry: Registry,
    place: torch.device,
    dtype: torch.dtype,
    *,
    training: bool = False,
    random_weights: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> LiveModel:
    """Build this rank's part of a model.

    Args:
        fields: the model in Megatron's names.
        layout: of the ranks there are.
        registry: the plugins, for how the layout cuts.
        place: this rank's device.
        dtype: of the model.
        training: leave logits cut along the vocabulary, and with TP activations along the sequence.
        random_weights: draw weights; they are undefined until they are loaded, otherwise.
        overrides: further fields of megatron-core's config.

    Raises:
        ConvertError: the layout does not divide the model.

    """
    layers = fields["num_layers"]
    me = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    mine = [chunk for chunk in layout.chunks(layers) if chunk.pp == me.pp]
    overrides = {
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
        **(overrides or {}),
    }
    fields = {**fields, "vocab_size": layout.padded(fields["vocab_size"])}
    built = [
        build_gpt_model(
            fields,
            dtype=dtype,
            device=place,
            sequence_parallel=training and layout.tp > 1,
            parallel_output=training,
            random_weights=random_weights,
            vp_stage=chunk.number if layout.vpp > 1 else None,
            overrides=overrides,
        )
        for chunk in mine
    ]
    return LiveModel(list(zip(mine, built, strict=True)), layout, layers, registry.resharders())
