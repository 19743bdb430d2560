"""A checkpoint of any format, seen as the tensors that its model's mapping table names.

A Hugging Face checkpoint has them as they are or in a codec's form, a Megatron one as what the table
makes of them. Whatever is missing or does not fit is kept as a problem, and the rest can be read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

from gptoss_convert.errors import blame
from gptoss_convert.fit import Fitter
from gptoss_convert.opening import config_of, open_source, own_config
from gptoss_convert.ops import Copy
from gptoss_convert.pieces import Piece, decoded, read_parts, require_equal
from gptoss_convert.plan import Step, make_step, parameters, to_megatron

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.fit import Direction
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_convert.scratch import Scratch
    from gptoss_convert.types import Codec, Config, ModelFamily, Side, TensorSource

Key = tuple[str, ...]  # the Hugging Face names of a rule on a layer


@dataclass(frozen=True)
class Logical:
    """One checkpoint.

    Attributes:
        source: where its tensors come from.
        format: the format's name.
        side: whose names its tensors have.
        family: of its model.
        config: Hugging Face's config of the model.
        codec: the quantized form it declares.
        fields: the model in Megatron's names, as the table has it.
        steps: what can be read, by the Hugging Face names.
        problems: what is missing, strange, or of another shape, a sentence each.

    """

    source: TensorSource
    format: str
    side: Side
    family: ModelFamily
    config: Config
    codec: Codec | None
    fields: Config
    steps: Mapping[Key, Step]
    problems: tuple[str, ...]


def open_logical(
    path: str | Path,
    registry: Registry,
    choice: Choice,
    *,
    config: Config | None = None,
    revision: str | None = None,
) -> Logical:
    """Look at a checkpoint's headers.

    Args:
        path: a folder, or a hub id.
        registry: the plugins.
        choice: decides where several plugins would do.
        config: of the model, for a checkpoint that carries none.
        revision: of a hub id.

    Raises:
        ConvertError: nothing can be said of it: no checkpoint, damaged headers, no config.

    """
    source = open_source(path, registry=registry, choice=choice, revision=revision)
    format_ = registry.format_of(source.path, None, choice.format)
    assert format_ is not None
    is_hf = format_.side == "hf"
    if is_hf:
        config = own_config(source)
    elif source.config is not None or config is None:
        config = config_of(source, registry, choice)
    family = registry.model_for(config, choice.model)
    where = str(source.path)
    if hasattr(source, "arrange"):
        source.arrange(parameters(family, config, where))
    fields = to_megatron(family, config, where)
    with blame(f"model family {family.name}"):
        rules = list(family.rules(config))
    codec = registry.codec_for(config, choice.codec) if is_hf else None
    fitter = Fitter(source.specs(), codec, registry.codecs().values())
    direction: Direction = "import" if is_hf else "export"
    drafts = list(fitter.fit(rules, fields["num_layers"], direction))
    fitter.finish(direction)
    steps = {tuple(d.hf): make_step(d, d.inputs[0].spec.dtype, direction) for d in drafts}
    return Logical(
        source,
        format_.name,
        format_.side,
        family,
        config,
        codec,
        fields,
        steps,
        tuple(fitter.problems),
    )


@dataclass(frozen=True)
class Part:
    """A piece of a step of one checkpoint, read.

    Attributes:
        side: whose tensors these are.
        step: what they are pieces of.
        stored: per input its parts, as they are stored.
        tensors: decoded.

    """

    side: Side
    step: Step
    stored: Sequence[Sequence[Tensor]]
    tensors: Sequence[Tensor]


def read(of: Logical, piece: Piece, scratch: Scratch, *, in_order: bool) -> Part:
    """Read and decode a piece, in memory of ``scratch``.

    Args:
        of: the checkpoint.
        piece: of one of its steps.
        scratch: memory.
        in_order: decode to contiguous tensors.

    Raises:
        MismatchError: a tensor stored under several names is not the same under each.

    """
    step = piece.step
    stored = [read_parts(of.source, piece, i, scratch) for i in step.inputs]
    as_is = in_order or isinstance(step.rule.op, Copy)
    tensors = [
        decoded(i, parts, scratch, as_is=as_is)
        for i, parts in zip(step.inputs, stored, strict=True)
    ]
    if of.side == "megatron":
        require_equal(step.inputs, tensors)
        tensors = tensors[:1]
    return Part(of.side, step, stored, tensors)


def in_common(key: Key, left: Part, right: Part | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What two parts have in common, tensor by tensor, in the same order and shape.

    Yields:
        the Hugging Face name, and views of both; twice the same one if there is no other part.

    """
    other = right or left
    if left.side == other.side and (len(key) == 1 or left.side == "hf"):
        yield from zip(key, left.tensors, other.tensors, strict=True)
    elif len(key) == 1:
        op = left.step.rule.op
        views = [
            op.forward(part.tensors) if part.side == "hf" else part.tensors[0]
            for part in (left, other)
        ]
        shape = views[0 if left.side == "hf" else 1].shape
        yield key[0], views[0].reshape(shape), views[1].reshape(shape)
    else:
        split = [_split(part) for part in (left, other)]
        shapes = [tensor.shape for tensor in split[0 if left.side == "megatron" else 1]]
        for name, one, two, shape in zip(key, *split, shapes, strict=True):
            yield name, one.reshape(shape), two.reshape(shape)


def _split(part: Part) -> Sequence[Tensor]:
    """The Hugging Face tensors; of a Megatron one as views of whatever shape the op makes."""
    if part.side == "hf":
        return part.tensors
    return part.step.rule.op.inverse(part.tensors[0])


def shapes_of(key: Key, step: Step) -> dict[str, tuple[int, ...]]:
    """The shapes of a step's Hugging Face tensors, by name."""
    return dict(zip(key, step.rule.hf.values(), strict=True))


def pieces(left: Step, right: Step | None, nbytes: int) -> Iterator[tuple[Piece, Piece | None]]:
    """Equal pieces of the same step of two checkpoints, of about ``nbytes`` logical bytes."""
    units = gcd(left.units, right.units) if right else left.units
    steps = [replace(step, units=units) for step in (left, right) if step]
    most = max(sum(i.spec.nbytes for i in step.inputs) for step in steps)
    count = max(1, min(units, nbytes * units // max(1, most)))
    for start in range(0, units, count):
        stop = min(start + count, units)
        one, *two = (Piece(step, start, stop, start) for step in steps)
        yield one, two[0] if two else None
