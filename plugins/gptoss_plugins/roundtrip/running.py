"""``roundtrip``: the weights of a live model, gathered from its ranks, beside Hugging Face's."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_convert.compare import difference, finite
from gptoss_convert.logical import Logical, Part, in_common, pieces, read, shapes_of
from gptoss_convert.scratch import Scratch
from gptoss_plugins.gpt_model.filling import load_by_megatron, parameter_of
from gptoss_plugins.gpt_model.forward import logits
from gptoss_plugins.gpt_model.live import build_live
from gptoss_plugins.verify.checking import plain
from gptoss_plugins.verify.logits import LIMITS, compare_logits, hugging_face_logits, prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.layout import Layout
    from gptoss_convert.plan import Step
    from gptoss_convert.registry import Registry

SCHEMA = "gptoss-convert.roundtrip/1"


@dataclass(frozen=True)
class Row:
    """One Hugging Face tensor, compared.

    Attributes:
        name, shape, dtype: as the Hugging Face checkpoint has it.
        match: whether the model's weights are the same numbers.
        max_error: the largest difference.
        nonfinite: how many of its values, and of the model's, are NaN or infinite.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    match: bool
    max_error: float
    nonfinite: tuple[int, int]


@dataclass
class Outcome:
    """What rank 0 found.

    Attributes:
        world: how many ranks there were.
        layout: theirs.
        dtype: of the model.
        rows: one per Hugging Face tensor.
        logits: how far the model's are from transformers'; None if they were not asked for.
        limit: the relative error that the logits may have.
        seconds: how long it took.

    """

    world: int
    layout: Layout
    dtype: str
    rows: list[Row] = field(default_factory=list)
    logits: dict[str, Any] | None = None
    limit: float = 0.0
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether every tensor matches, and the logits are near enough."""
        near = self.logits is None or self.logits["relative_error"] <= self.limit
        return near and all(row.match for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        sizes = ("tp", "pp", "vpp", "ep", "etp")
        return {
            "schema": SCHEMA,
            "ok": self.is_good,
            "world": self.world,
            "layout": {name: getattr(self.layout, name) for name in sizes},
            "dtype": self.dtype,
            "tensors": [
                {**vars(row), "shape": list(row.shape), "nonfinite": list(row.nonfinite)}
                for row in self.rows
            ],
            "logits": self.logits and plain(self.logits),
            "logits_limit": finite(self.limit),
            "seconds": round(self.seconds, 3),
        }


def round_trip(
    model: Logical,
    checkpoint: Logical,
    layout: Layout,
    registry: Registry,
    place: torch.device,
    *,
    dtype: torch.dtype,
    prompt_length: int | None,
    limit: float | None = None,
) -> Outcome | None:
    """Load a Megatron checkpoint into the parallel model, gather it, compare it.

    All ranks call this together, within ``world.world_of``.

    Args:
        model: the Hugging Face checkpoint.
        checkpoint: the Megatron one.
        layout: of the ranks there are.
        registry: the plugins, for how the layout cuts.
        place: this rank's device.
        dtype: of the model.
        prompt_length: tokens to compare logits on; None for no logits.
        limit: the relative error that the logits may have; by default what the type allows.

    Returns:
        what was found, on rank 0; None elsewhere.

    Raises:
        ConvertError: the layout does not fit the world or the model, or the checkpoint not the model.

    """
    started = time.monotonic()
    world = dist.get_world_size()
    live = build_live(model.fields, layout, registry, place, dtype)
    load_by_megatron(live, checkpoint)
    layers = model.fields["num_layers"]
    outcome = Outcome(world, layout, str(dtype).removeprefix("torch."))
    for key, step in checkpoint.steps.items():
        parameter = parameter_of(step, layers, checkpoint.side)
        whole = live.whole(parameter)
        if whole is not None:
            outcome.rows += _rows(key, model, step, whole.cpu())
    if prompt_length:
        ids = prompt(model.fields["vocab_size"], prompt_length)
        made = logits(live.models, ids.to(place))
        ours = _on_first(made, (prompt_length, model.fields["vocab_size"]), place)
        if ours is not None:
            theirs = hugging_face_logits(
                model.source.path,
                ids,
                dtype=dtype,
                device=place,
                quantized=model.codec is not None,
            )
            outcome.logits = compare_logits(theirs, ours)
            outcome.limit = LIMITS[dtype] if limit is None else limit
    outcome.seconds = time.monotonic() - started
    return outcome if dist.get_rank() == 0 else None


def _rows(key: tuple[str, ...], model: Logical, step: Step, whole: torch.Tensor) -> Iterator[Row]:
    """Compare a gathered parameter with the Hugging Face tensors that it is made of."""
    theirs = model.steps.get(key)
    if theirs is None:
        return
    scratch = Scratch()
    ((piece, _),) = pieces(theirs, None, 1 << 62)
    reference = read(model, piece, scratch, in_order=False)
    ours = Part("megatron", step, [], [whole])
    shapes = shapes_of(key, step)
    for name, one, two in in_common(key, reference, ours):
        found = difference(one, two, scratch)
        dtype = theirs.inputs[list(key).index(name)].spec.dtype
        yield Row(name, shapes[name], dtype, found.is_equal, found.largest, found.nonfinite)


def _on_first(
    made: torch.Tensor | None, size: tuple[int, int], place: torch.device
) -> torch.Tensor | None:
    """Logits of the last stage, float32 ``[tokens, vocabulary]``, on rank 0; None elsewhere."""
    last = dist.get_world_size() - 1  # of the last stage, whatever the layout
    if made is not None:
        made = made[0, :, : size[1]].float().contiguous()
    me = dist.get_rank()
    if last == 0:
        return None if made is None else made.cpu()
    if me == last:
        assert made is not None
        dist.send(made, 0)
    if me != 0:
        return None
    room = torch.empty(size, dtype=torch.float32, device=place)
    dist.recv(room, last)
    return room.cpu()
