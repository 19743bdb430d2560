"""The parameters of a running model, spread over its ranks, as the mapping table's whole tensors.

Both ways go by ``layout.pieces``, the arithmetic that cuts files, and not by megatron-core's own
description of its shards: what is gathered here and loaded by megatron-core was cut by two programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_convert import logical
from gptoss_convert.layout import Layout, Parameter, Piece, join, pieces, take
from gptoss_convert.scratch import Scratch
from gptoss_plugins.gpt_model.build import build_gpt_model, load_checkpoint
from gptoss_plugins.gpt_model.world import coordinates
from gptoss_plugins.megatron.legacy.names import LOCAL_GROUPED, stored_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch import Tensor

    from gptoss_convert.logical import Logical
    from gptoss_convert.plan import Step
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


def build_live(
    fields: Mapping[str, Any],
    checkpoint: Logical,
    layout: Layout,
    registry: Registry,
    place: torch.device,
    dtype: torch.dtype,
) -> LiveModel:
    """Build this rank's part of a model and load it.

    Args:
        fields: the model in Megatron's names.
        checkpoint: a Megatron checkpoint; megatron-core loads ``torch_dist``, the rest is cut here.
        layout: of the ranks there are.
        registry: the plugins, for how the layout cuts.
        place: this rank's device.
        dtype: of the model.

    Raises:
        ConvertError: the layout does not divide the model, or the checkpoint is another model's.

    """
    layers = fields["num_layers"]
    me = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    mine = [chunk for chunk in layout.chunks(layers) if chunk.pp == me.pp]
    overrides = {
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
    }
    fields = {**fields, "vocab_size": layout.padded(fields["vocab_size"])}
    built = [
        build_gpt_model(
            fields,
            dtype=dtype,
            device=place,
            vp_stage=chunk.number if layout.vpp > 1 else None,
            overrides=overrides,
        )
        for chunk in mine
    ]
    live = LiveModel(list(zip(mine, built, strict=True)), layout, layers, registry.resharders())
    if checkpoint.format == "torch_dist":
        load_checkpoint(built, checkpoint.source.path)
    else:
        for step in checkpoint.steps.values():
            live.fill(parameter_of(step, layers), _whole(checkpoint, step))
    return live


def parameter_of(step: Step, layers: int) -> Parameter:
    """The Megatron parameter that a step reads."""
    found = step.inputs[0]
    return Parameter.of(step.rule, found.name, found.spec.shape, step.layer, layers)


def _whole(of: Logical, step: Step) -> Tensor:
    ((piece, _),) = logical.pieces(step, None, 1 << 62)
    (tensor,) = logical.read(of, piece, Scratch(), in_order=True).tensors
    return tensor
