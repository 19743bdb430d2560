"""Pure planning: specs and rules in, ConversionPlan out. Nothing here reads or writes a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import FLOATS, narrowest
from gptoss_convert.errors import ConfigError, PlanError, blame
from gptoss_convert.fit import Direction, Draft, Fitter, Input, house_dtype
from gptoss_convert.layout import Layout, Parameter, Ranges, grain
from gptoss_convert.ops import COPY, Blocks, Op, PadVocab, units
from gptoss_convert.types import Codec, Config, ModelFamily, Rule, TensorSpec, TrainingState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.encoding import Encoding

PLAN_SCHEMA = "gptoss-convert.plan/1"
MOST_LAYERS = 4096  # of a model; planning a number from a stranger's config would have no end


@dataclass(frozen=True)
class Output:
    """A logical tensor of the target, and the tensors it is stored as.

    Attributes:
        name: its logical name.
        spec: its logical shape and dtype.
        also: further names under which it is written.
        codec: what encodes it.
        parts: (stored name, stored spec) of what the codec makes of it.
        hints: names of the source's own parts that the codec is to get, if there are any.
        box: by dim the ranges of it that are written, for one rank's file; () for all. Ranges may
            pass the end of dim 0, where zeros pad a vocabulary.

    """

    name: str
    spec: TensorSpec
    also: tuple[str, ...] = ()
    codec: Codec | None = None
    parts: tuple[tuple[str, TensorSpec], ...] = ()
    hints: tuple[str, ...] = ()
    box: tuple[Ranges, ...] = ()

    @property
    def stored(self) -> tuple[tuple[str, TensorSpec], ...]:
        """Names and specs as they are written."""
        return self.parts or ((self.name, self.written),)

    @property
    def written(self) -> TensorSpec:
        """What is written of it, before any encoding."""
        if not self.box:
            return self.spec
        shape = tuple(sum(stop - start for start, stop in ranges) for ranges in self.box)
        return TensorSpec(shape, self.spec.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(spec.nbytes for _, spec in self.stored)


@dataclass(frozen=True)
class Step:
    """One rule at work on one layer.

    Attributes:
        rule: the line of the mapping table.
        layer: which layer, or None outside the layers.
        inputs: what is read. On export a tensor stored under several names has several inputs,
            which must be equal.
        outputs: what is written.
        units: into how many equal slices of dim 0 the step may be cut.

    """

    rule: Rule
    layer: int | None
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    units: int

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs, each counted once."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The units that are made, in order; all, unless a part of the rows is written."""
        box = self.outputs[0].box
        if not box or self.units == 1:
            return ((0, self.units),)
        rows = self.outputs[0].spec.shape[0] // self.units
        return tuple((start // rows, min(stop // rows, self.units)) for start, stop in box[0])

    def part(self, name: str, box: tuple[Ranges, ...]) -> Step:
        """The step with only a box of its one output made, under a rank's name for it."""
        output = replace(self.outputs[0], name=name, also=(), box=box)
        if not box:
            return replace(self, outputs=(output,))
        whole = output.spec.shape[0]
        rows = whole // self.units
        edges = (edge for run in box[0] for edge in run if edge < whole)
        apart = all(edge % rows == 0 for edge in edges)
        return replace(self, outputs=(output,), units=self.units if apart else 1)


@dataclass(frozen=True)
class Group:
    """Steps that are written together, in order; the unit of parallel work and of resuming."""

    name: str
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(step.nbytes for step in self.steps)


@dataclass(frozen=True)
class Target:
    """How a Megatron checkpoint is to be written.

    Attributes:
        layout: the parallel layout it is for.
        dialect: which of its format's ways to name things; "" for the first.
        iteration: its number.
        attachments: further files, copied as they are: name in the iteration's folder -> file.
        state: what training left, to be carried along unchanged.

    """

    layout: Layout = field(default_factory=Layout)
    dialect: str = ""
    iteration: int = 0
    attachments: Mapping[str, Path] = field(default_factory=dict)
    state: TrainingState | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that will happen, known before the first byte moves.

    Attributes:
        direction: ``import`` (Hugging Face -> Megatron), ``export``, from Hugging Face to Hugging
            Face ``quantize`` or ``dequantize``, from Megatron to Megatron ``reshard``.
        family: name of the model family.
        config: Hugging Face's config of the model.
        megatron_config: the same model in Megatron's fields.
        dtype: element type of what is written, encoded tensors apart.
        steps: in the order they run.
        dropped: tensors that are not carried over, and why.
        files: companions to carry along (tokenizer, config, ...): name -> file.
        name_or_path: how the user named the source, if that was a hub id.
        kept: steps that copy the hints of the source's codec beside a Megatron checkpoint.
        quantization: the ``quantization_config`` of what is written, if it is quantized.
        encoding: name of the codec of what is written, and its options.
        target: how a Megatron checkpoint is to be written.

    """

    direction: Direction
    family: str
    config: Config
    megatron_config: Config
    dtype: str
    steps: tuple[Step, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    name_or_path: str | None = None
    kept: tuple[Step, ...] = ()
    quantization: Mapping[str, Any] | None = None
    encoding: Mapping[str, str] = field(default_factory=dict)
    target: Target = field(default_factory=Target)

    @property
    def parameters(self) -> int:
        """Number of weights, each logical Hugging Face tensor counted once."""
        side = "outputs" if self.direction in ("export", "reshard") else "inputs"
        return sum(t.spec.numel for step in self.steps for t in getattr(step, side))

    @property
    def bytes_in(self) -> int:
        """Bytes that will be read."""
        return sum(step_bytes_in(step) for step in self.steps)

    @property
    def bytes_out(self) -> int:
        """Bytes of tensors that will be written, without framing."""
        return sum(step.nbytes for step in (*self.steps, *self.kept))

    @property
    def codecs(self) -> tuple[str, ...]:
        """Names of the codecs that decode the source."""
        return tuple(sorted({i.codec.name for s in self.steps for i in s.inputs if i.codec}))

    @property
    def casts(self) -> tuple[tuple[str, str], ...]:
        """(from, to) dtypes of the conversions of element type, those that round first."""
        plain = [s for s in self.steps if not any(o.codec for o in s.outputs)]
        pairs = {(i.spec.dtype, o.spec.dtype) for s in plain for i in s.inputs for o in s.outputs}
        return tuple(sorted(p for p in pairs if p[0] != p[1]))

    @property
    def hints_found(self) -> bool:
        """Whether the source's own parts are at hand for what is encoded."""
        return any(output.hints for step in self.steps for output in step.outputs)

    def digest(self) -> str:
        """Hash of all that decides the output's bytes, the source's content apart."""
        facts = {**self.to_json(), "config": dict(self.config), "name": self.name_or_path}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain values; the schema is described in docs/json.md."""
        return {
            "schema": PLAN_SCHEMA,
            "direction": self.direction,
            "model": self.family,
            "dtype": self.dtype,
            "codecs": list(self.codecs),
            "encoding": dict(self.encoding) or None,
            "hints_found": self.hints_found,
            "hints_kept": sum(step.nbytes for step in self.kept),
            "parameters": self.parameters,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "layout": {**asdict(self.target.layout), "stages": list(self.target.layout.stages)},
            "dialect": self.target.dialect or None,
            "iteration": self.target.iteration,
            "attachments": sorted(self.target.attachments),
            "training_state": self.target.state is not None,
            "megatron_config": dict(self.megatron_config),
            "files": sorted(self.files),
            "dropped": [{"name": name, "reason": reason} for name, reason in self.dropped],
            "steps": [_step_json(step) for step in self.steps],
        }


def step_bytes_in(step: Step) -> int:
    """Bytes a step reads, padding rows left out."""
    return sum(
        i.spec.nbytes if i.codec is None else sum(spec.nbytes for _, spec in i.parts)
        for i in step.inputs
    )


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "layer": step.layer,
        "op": _op_name(step.rule.op),
        "shard": step.rule.shard.value,
        "inputs": [
            {**_tensor_json(i), "codec": i.codec.name, "parts": [n for n, _ in i.parts]}
            if i.codec
            else _tensor_json(i)
            for i in step.inputs
        ],
        "outputs": [
            {
                **_tensor_json(o),
                **({"also": list(o.also)} if o.also else {}),
                **({"codec": o.codec.name, "parts": [n for n, _ in o.parts]} if o.codec else {}),
            }
            for o in step.outputs
        ],
    }


def _op_name(op: Op) -> str:
    """The op with its fields; Python's default repr has an address in it, new in every process."""
    plain = type(op).__repr__ is object.__repr__
    return f"{type(op).__module__}.{type(op).__qualname__}" if plain else repr(op)


def _tensor_json(tensor: Input | Output) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.spec.dtype, "shape": list(tensor.spec.shape)}


def make_plan(
    direction: Direction,
    specs: Mapping[str, TensorSpec],
    family: ModelFamily,
    config: Config,
    *,
    where: str,
    codec: Codec | None = None,
    known_codecs: Iterable[Codec] = (),
    dtype: str | None = None,
    files: Mapping[str, Path] | None = None,
    name_or_path: str | None = None,
    encoding: Encoding | None = None,
    keep_hints: bool = False,
    target: Target | None = None,
) -> ConversionPlan:
    """Fit a checkpoint's specs to its family's mapping table.

    Args:
        direction: as in :class:`ConversionPlan`.
        specs: what the source stores.
        family: the model family.
        config: Hugging Face's config of the model.
        where: the checkpoint, for the message.
        codec: the quantized form the source declares, if any.
        known_codecs: every codec there is, to explain an undeclared quantized form.
        dtype: element type to write; None keeps the source's.
        files: companions to carry along.
        name_or_path: the hub id, if the user named one.
        encoding: how to encode what the table calls quantizable.
        keep_hints: carry the hints of the source's codec along.
        target: how a Megatron checkpoint is to be written.

    Raises:
        PlanError: listing every misfit.

    """
    megatron_config = to_megatron(family, config, where)
    with blame(f"model family {family.name}"):
        rules, layers = list(family.rules(config)), megatron_config["num_layers"]
    fitter = Fitter(specs, codec, known_codecs)
    drafts = list(fitter.fit(rules, layers, direction))
    fitter.finish(direction)
    strict = direction not in ("export", "reshard")
    alike = [draft for draft in drafts if not (encoding and _is_encodable(draft))]
    house = house_dtype(alike, fitter.problems, strict=strict)
    if encoding:
        house = _beside_encoded(drafts)
    names = Counter(name for draft in drafts for name in draft.megatron)
    fitter.problems += [
        f"{name}: {count} rules make it; mend the table of {family.name}"
        for name, count in names.items()
        if count > 1
    ]
    kept = [dtype or _kept_dtype(draft, direction, house) for draft in drafts]
    steps = [make_step(*pair, direction) for pair in zip(drafts, kept, strict=True)]
    if encoding:
        steps = [encoding.encoded(step, fitter.problems) for step in steps]
    if fitter.problems:
        raise PlanError(where, fitter.problems)
    if encoding and (unfit := encoding.unfit_hints(steps)):
        raise PlanError(encoding.hints_of, unfit)
    return ConversionPlan(
        direction,
        family.name,
        config,
        megatron_config,
        narrowest(o.spec.dtype for step in steps for o in step.outputs if not o.codec),
        tuple(steps),
        tuple(fitter.dropped),
        files or {},
        name_or_path,
        tuple(_keep_hints(steps)) if keep_hints else (),
        encoding.declaration(config, family) if encoding else None,
        encoding.to_json() if encoding else {},
        target or Target(),
    )


def parameters(family: ModelFamily, config: Config, where: str) -> dict[str, Parameter]:
    """Every Megatron parameter of a model by name, further names included.

    Raises:
        ConfigError: the config does not make the model.

    """
    layers = to_megatron(family, config, where)["num_layers"]
    with blame(f"model family {family.name}"):
        rules = list(family.rules(config))
    return {
        name: Parameter.of(draft.rule, name, draft.shape, draft.layer, layers)
        for draft in Fitter({}, None, ()).drafts(rules, layers)
        for name in draft.megatron
    }


def _keep_hints(steps: Iterable[Step]) -> Iterator[Step]:
    """Steps that copy hints as they are stored."""
    for step in steps:
        for tensor in (i for i in step.inputs if i.codec):
            for name, spec in tensor.parts:
                if name.endswith(tensor.codec.hints if tensor.codec else ()):
                    source = Input(name, spec, ((name, spec),))
                    rule = Rule({name: spec.shape}, name)
                    yield Step(rule, step.layer, (source,), (Output(name, spec),), spec.shape[0])


def to_megatron(family: ModelFamily, config: Config, where: str) -> dict[str, Any]:
    """The config in Megatron's fields.

    Raises:
        ConfigError: naming every field that is absent or of another type.
    """
    wrong = [
        f"{name} is missing" if name not in config else f"{name} is {config[name]!r}"
        for name, kind in family.fields.items()
        if not isinstance(config.get(name), kind)
        or (isinstance(config[name], bool) and kind is not bool)
    ]
    if wrong:
        raise ConfigError(
            f"{where}: config.json: {'; '.join(wrong)}; restore the model's own config.json"
        )
    with blame(f"model family {family.name}"):
        fields = family.megatron_config(config)
    if fields["num_layers"] > MOST_LAYERS:
        raise ConfigError(
            f"{where}: config.json: a model of {fields['num_layers']} layers is none; restore the "
            f"model's own config.json"
        )
    return fields


def _is_encodable(draft: Draft) -> bool:
    """Whether a codec takes a draft's tensors, in whatever type they are."""
    return draft.rule.quantizable and all(i.spec.dtype in FLOATS for i in draft.inputs)


def _beside_encoded(drafts: Sequence[Draft]) -> str:
    """The type of what is not encoded: the source's, or BF16 where that has several."""
    plain = [i for draft in drafts if not draft.rule.quantizable for i in draft.inputs]
    dtypes = {i.spec.dtype for i in plain}
    return dtypes.pop() if len(dtypes) == 1 else "BF16"


def _kept_dtype(draft: Draft, direction: Direction, house: str) -> str:
    """The type that a draft is written in if the user names none.

    What a codec decodes keeps its own type if the others' does not hold it: F16 has not the range
    of BF16, and rounding would be silent.
    """
    found = draft.inputs[0]
    own = direction == "reshard" or (found.codec and narrowest((found.spec.dtype, house)) != house)
    return found.spec.dtype if own else house


def make_step(draft: Draft, dtype: str, direction: Direction) -> Step:
    """The step that a draft becomes, writing ``dtype``."""
    rule = draft.rule
    if direction == "reshard":
        rule = replace(rule, op=_kept(rule.op, draft))
    if direction in ("import", "reshard"):
        first, *also = draft.megatron
        outputs: tuple[Output, ...] = (Output(first, TensorSpec(draft.shape, dtype), tuple(also)),)
    else:
        outputs = tuple(Output(n, TensorSpec(s, dtype)) for n, s in draft.hf.items())
    count = units(rule.op, draft.shape)
    if len(outputs) > 1 or any(i.codec and not i.codec.sliceable for i in draft.inputs):
        count = 1  # outputs are written one behind the other, so pieces must not alternate
    return Step(rule, draft.layer, draft.inputs, outputs, count)


def _kept(op: Op, draft: Draft) -> Op:
    """What is done to a Megatron tensor that stays one: nothing, in blocks that stay whole."""
    if isinstance(op, PadVocab) or not draft.shape:
        return op if isinstance(op, PadVocab) else COPY
    count = grain(op, draft.shape)
    return COPY if count == draft.shape[0] else Blocks(count)
