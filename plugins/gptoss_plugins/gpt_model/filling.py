"""Weights of a checkpoint in any format, straight into a running model.

They come by the sources, codecs and rules of a conversion, piece by piece: never the whole model on
the host, and every rank reads only the pieces of which it has a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gptoss_convert import transpose
from gptoss_convert.device import working_on
from gptoss_convert.errors import PlanError
from gptoss_convert.layout import Parameter
from gptoss_convert.logical import pieces
from gptoss_convert.ops import Copy
from gptoss_convert.pieces import decoded, read_parts, require_equal
from gptoss_convert.readahead import read_ahead
from gptoss_convert.scratch import Scratch
from gptoss_plugins.gpt_model.build import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from gptoss_convert.device import Device
    from gptoss_convert.layout import Piece
    from gptoss_convert.logical import Logical
    from gptoss_convert.pieces import Piece as Rows
    from gptoss_convert.plan import Step
    from gptoss_plugins.gpt_model.live import LiveModel

PIECE_BYTES = 32 << 20  # of decoded weights


class _Task(NamedTuple):
    """Some rows of a parameter, from ``first`` on, and this rank's piece of it."""

    parameter: Parameter
    piece: Piece
    rows: Rows
    first: int


def load_by_megatron(live: LiveModel, checkpoint: Logical) -> None:
    """Load a Megatron checkpoint: ``torch_dist`` by megatron-core itself, the rest as ``fill`` does.

    What megatron-core loads, and we gather, was cut by two programs: that is what makes a round trip
    prove something. All ranks call this together.

    Raises:
        ConvertError: the checkpoint is another model's.

    """
    if checkpoint.format == "torch_dist":
        load_checkpoint(live.models, checkpoint.source.path)
    else:
        fill(live, checkpoint)


def fill(
    live: LiveModel, checkpoint: Logical, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Load this rank's part of a checkpoint of any format. Ranks need not wait for each other.

    Args:
        live: the model.
        checkpoint: of it.
        progress: is told bytes as they arrive.

    Raises:
        PlanError: the checkpoint is not whole, or another model's.
        ConvertError: a tensor cannot be read.

    """
    if checkpoint.problems:
        raise PlanError(str(checkpoint.source.path), checkpoint.problems)
    tasks = list(_tasks(live, checkpoint))
    with working_on(live.place.type) as device, device.at_work():
        memory, made = (Scratch(), Scratch()), device.memory()

        def read(task: _Task, scratch: Scratch) -> list[list[Tensor]]:
            step = task.rows.step
            return [read_parts(checkpoint.source, task.rows, i, scratch) for i in step.inputs]

        for task, stored in read_ahead(tasks, read, memory):
            made.reset()
            rows = _rows(checkpoint, task, stored, device, made)
            live.fill(task.parameter, task.piece, rows, task.first)
            progress(rows.nbytes)
            if live.place.type == "cuda":  # what was read is copied before its memory is used again
                torch.cuda.current_stream().synchronize()


def parameter_of(step: Step, layers: int, side: str) -> Parameter:
    """The Megatron parameter that a step of a checkpoint is about."""
    if side == "megatron":
        found = step.inputs[0]
        return Parameter.of(step.rule, found.name, found.spec.shape, step.layer, layers)
    made = step.outputs[0]
    return Parameter.of(step.rule, made.name, made.spec.shape, step.layer, layers)


def _tasks(live: LiveModel, checkpoint: Logical) -> Iterator[_Task]:
    """What this rank reads, in the order of the model."""
    for step in checkpoint.steps.values():
        parameter = parameter_of(step, live.layers, checkpoint.side)
        piece = live.mine(parameter)
        if piece is None:
            continue
        if parameter.padded:
            live.local(parameter).zero_()
        for rows, _ in pieces(step, None, PIECE_BYTES):
            each = parameter.shape[0] // rows.step.units
            start, stop = rows.start * each, rows.stop * each
            if any(low < stop and start < high for low, high in piece.box[0]):
                yield _Task(parameter, piece, rows, start)


def _rows(
    checkpoint: Logical,
    task: _Task,
    stored: Sequence[Sequence[Tensor]],
    device: Device,
    made: Scratch,
) -> Tensor:
    """Decoded and rewritten: ``[rows, *parameter.shape[1:]]`` where the model is."""
    step, op = task.rows.step, task.rows.step.rule.op
    tensors = [
        decoded(i, [device.here(part) for part in parts], made, as_is=isinstance(op, Copy))
        for i, parts in zip(step.inputs, stored, strict=True)
    ]
    if checkpoint.side == "megatron":
        require_equal(step.inputs, tensors)
        return tensors[0]
    view = op.forward(tensors)
    if not view.is_contiguous():
        room = made.take(view.numel() * view.itemsize).view(view.dtype).view(view.shape)
        transpose.copy(room, view)
        view = room
    return view.view(-1, *task.parameter.shape[1:])
