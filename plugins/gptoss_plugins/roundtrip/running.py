"""``roundtrip``: the weights of a live model, gathered from its ranks, beside Hugging Face's."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_convert.compare import difference
from gptoss_convert.layout import Parameter
from gptoss_convert.logical import Logical, Part, in_common, pieces, read
from gptoss_convert.scratch import Scratch
from gptoss_plugins.gpt_model.build import (
    build_gpt_model,
    initialize_parallel,
    load_checkpoint,
    shut_down_parallel,
)
from gptoss_plugins.gpt_model.cpu_shim import cuda_means_cpu
from gptoss_plugins.gpt_model.forward import logits
from gptoss_plugins.gpt_model.live import LiveModel, coordinates, require_world
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

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    match: bool
    max_error: float


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
            "tensors": [{**vars(row), "shape": list(row.shape)} for row in self.rows],
            "logits": self.logits,
            "logits_limit": self.limit,
            "seconds": round(self.seconds, 3),
        }


@contextlib.contextmanager
def world_of(layout: Layout, device: str | None) -> Iterator[torch.device]:
    """The ranks, joined in a layout; on CPUs megatron-core's calls for CUDA mean the CPU."""
    place = initialize_parallel(
        layout.tp,
        layout.pp,
        layout.ep,
        vpp=layout.vpp if layout.vpp > 1 else None,
        device=device,
    )
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of megatron-core and torch, to their own developers
            if place.type == "cpu":
                stack.enter_context(cuda_means_cpu())
            yield place
    finally:
        shut_down_parallel()


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
    trust_remote_code: bool = False,
) -> Outcome | None:
    """Load a Megatron checkpoint into the parallel model, gather it, compare it.

    All ranks call this together, within :func:`world_of`.

    Args:
        model: the Hugging Face checkpoint.
        checkpoint: the Megatron one.
        layout: of the ranks there are.
        registry: the plugins, for how the layout cuts.
        place: this rank's device.
        dtype: of the model.
        prompt_length: tokens to compare logits on; None for no logits.
        limit: the relative error that the logits may have; by default what the type allows.
        trust_remote_code: for transformers.

    Returns:
        what was found, on rank 0; None elsewhere.

    Raises:
        ConvertError: the layout does not fit the world or the model, or the checkpoint not the model.

    """
    started = time.monotonic()
    world = dist.get_world_size()
    require_world(layout, world)
    live = _built(model, checkpoint, layout, registry, place, dtype)
    outcome = Outcome(world, layout, str(dtype).removeprefix("torch."))
    for key, step in checkpoint.steps.items():
        parameter = _parameter(step, model)
        whole = live.whole(parameter)
        if whole is not None:
            outcome.rows += _rows(key, model, step, whole.cpu())
    if prompt_length:
        ids = prompt(model.fields["vocab_size"], prompt_length)
        ours = _on_first(logits([m for _, m in live.chunks], ids.to(place)), live, model, ids)
        if ours is not None:
            theirs = hugging_face_logits(
                model.source.path,
                ids,
                dtype=dtype,
                device=place,
                quantized=model.codec is not None,
                trust_remote_code=trust_remote_code,
            )
            outcome.logits = compare_logits(theirs, ours)
            outcome.limit = LIMITS[dtype] if limit is None else limit
    outcome.seconds = time.monotonic() - started
    return outcome if dist.get_rank() == 0 else None


def _built(
    model: Logical,
    checkpoint: Logical,
    layout: Layout,
    registry: Registry,
    place: torch.device,
    dtype: torch.dtype,
) -> LiveModel:
    """This rank's part, loaded."""
    layers = model.fields["num_layers"]
    me = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    mine = [chunk for chunk in layout.chunks(layers) if chunk.pp == me.pp]
    overrides = {
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
    }
    fields = {**model.fields, "vocab_size": layout.padded(model.fields["vocab_size"])}
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
            live.fill(_parameter(step, model), _whole(checkpoint, step))
    return live


def _parameter(step: Step, model: Logical) -> Parameter:
    found = step.inputs[0]
    shape = found.spec.shape
    return Parameter.of(step.rule, found.name, shape, step.layer, model.fields["num_layers"])


def _whole(of: Logical, step: Step) -> torch.Tensor:
    ((piece, _),) = pieces(step, None, 1 << 62)
    (tensor,) = read(of, piece, Scratch(), in_order=True).tensors
    return tensor


def _rows(key: tuple[str, ...], model: Logical, step: Step, whole: torch.Tensor) -> Iterator[Row]:
    """Compare a gathered parameter with the Hugging Face tensors that it is made of."""
    theirs = model.steps.get(key)
    if theirs is None:
        return
    scratch = Scratch()
    ((piece, _),) = pieces(theirs, None, 1 << 62)
    reference = read(model, piece, scratch, in_order=False)
    ours = Part("megatron", step, [], [whole])
    shapes = {
        name if step.layer is None else name.replace("{L}", str(step.layer)): shape
        for name, shape in step.rule.hf.items()
    }
    for name, one, two in in_common(key, reference, ours):
        found = difference(one, two, scratch, blocks=False)
        dtype = theirs.inputs[list(key).index(name)].spec.dtype
        yield Row(name, shapes[name], dtype, found.is_equal, found.largest)


def _on_first(
    made: torch.Tensor | None, live: LiveModel, model: Logical, ids: torch.Tensor
) -> torch.Tensor | None:
    """Logits of the last stage, float32 ``[tokens, vocabulary]``, on rank 0; None elsewhere."""
    last = dist.get_world_size() - 1  # of the last stage, whatever the layout
    size = (ids.shape[1], model.fields["vocab_size"])
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
    place = next(live.chunks[0][1].parameters()).device
    room = torch.empty(size, dtype=torch.float32, device=place)
    dist.recv(room, last)
    return room.cpu()
