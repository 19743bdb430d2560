"""Fitting a checkpoint's specs to a mapping table; every misfit is found before any is reported."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gptoss_convert.dtypes import FLOATS, narrowest
from gptoss_convert.errors import blame
from gptoss_convert.ops import COPY, Drop, PadVocab, forward_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gptoss_convert.types import Codec, Rule, TensorSpec

Direction = Literal["import", "export", "quantize", "dequantize", "reshard"]
_FEW = 20  # with more misfits than this, near-miss hints cost more than they help


@dataclass(frozen=True)
class Input:
    """A logical tensor of the source, and the stored tensors it is made of.

    Attributes:
        name: its logical name.
        spec: its logical shape and dtype, without padding rows.
        parts: (stored name, stored spec) of each part; one, of the same name, without a codec.
        codec: what decodes the parts.

    """

    name: str
    spec: TensorSpec
    parts: tuple[tuple[str, TensorSpec], ...]
    codec: Codec | None = None


@dataclass(frozen=True)
class Draft:
    """A rule whose inputs were found on one layer; what it writes has no dtype yet."""

    rule: Rule
    layer: int | None
    hf: Mapping[str, tuple[int, ...]]
    megatron: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: tuple[Input, ...]


def expand(rules: Iterable[Rule], layers: int) -> Iterator[tuple[Rule, int | None]]:
    """The table written out: rules before the first layer rule, the layers, the rules after."""
    table = list(rules)
    inside = [any("{L}" in name for name in rule.hf) for rule in table]
    first = inside.index(True) if True in inside else len(table)
    yield from ((rule, None) for rule in table[:first])
    for layer in range(layers):
        yield from ((rule, layer) for rule, yes in zip(table, inside, strict=True) if yes)
    rest = zip(table[first:], inside[first:], strict=True)
    yield from ((rule, None) for rule, yes in rest if not yes)


class Fitter:
    """Takes tensors out of the source's specs rule by rule.

    Attributes:
        problems: what does not fit, each ``<tensor>: <what is wrong>; <what to do>``.
        dropped: (tensor, reason) of what is not carried over.

    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], codec: Codec | None, known: Iterable[Codec]
    ) -> None:
        self.problems: list[str] = []
        self.dropped: list[tuple[str, str]] = []
        self._codec = codec
        self._known = tuple(known)
        self._missing: list[str] = []
        self._broken: set[str] = set()  # logical tensors whose parts do not fit together
        self._left = {name: Input(name, spec, ((name, spec),)) for name, spec in specs.items()}
        if codec:
            self._fold(codec)

    def fit(self, rules: Iterable[Rule], layers: int, direction: Direction) -> Iterator[Draft]:
        """Drafts of the steps, in order, for all rules whose tensors are there and fit."""
        for rule, layer in expand(rules, layers):
            draft = self._draft(rule, layer)
            if direction in ("quantize", "dequantize"):
                yield from self._unchanged(draft)
            elif isinstance(rule.op, Drop):
                self._drop(draft, rule.op.reason)
            elif inputs := self._take(draft, direction):
                yield replace(draft, inputs=inputs)

    def drafts(self, rules: Iterable[Rule], layers: int) -> Iterator[Draft]:
        """The table written out, whatever the source has; what Megatron does not keep left out."""
        for rule, layer in expand(rules, layers):
            if not isinstance(rule.op, Drop):
                yield self._draft(rule, layer)

    def _unchanged(self, draft: Draft) -> Iterator[Draft]:
        """Each Hugging Face tensor by itself, as the same tensor; a dropped one only if present."""
        optional = isinstance(draft.rule.op, Drop)
        for name, shape in draft.hf.items():
            if optional and name not in self._left:
                continue
            if found := self._take_one(name, shape, padded=False):
                rule = replace(draft.rule, hf={name: shape}, megatron=name, op=COPY, also=())
                yield Draft(rule, draft.layer, {name: shape}, (name,), shape, (found,))

    def finish(self, direction: Direction) -> None:
        """Report the tensors that are missing and those that no rule took."""
        few = len(self._missing) <= _FEW and len(self._left) <= _FEW
        for name in self._missing:
            near = difflib.get_close_matches(name, self._left, 1, 0.8) if few else []
            self.problems.append(f"{name}: is missing; {_missing_remedy(near)}")
        for name in self._left:
            self.problems.append(f"{name}: no rule maps it; {self._stray_remedy(name, direction)}")

    def _fold(self, codec: Codec) -> None:
        """Replace the parts of quantized tensors by the tensors they stand for."""
        bases = {n.removesuffix(s) for n in self._left for s in codec.suffixes if n.endswith(s)}
        for base in sorted(bases):
            names = [base + suffix for suffix in codec.suffixes]
            found = {n: self._left.pop(n).spec for n in names if n in self._left}
            if absent := [n for n in names if n not in found]:
                self._missing += absent
                self._broken.add(base)
                continue
            with blame(f"codec {codec.name}"):
                try:
                    spec = codec.spec(list(found.values()))
                    self._left[base] = Input(base, spec, tuple(found.items()), codec)
                except ValueError as error:
                    text = f"{base}: {error}; the checkpoint is damaged, fetch it again"
                    self.problems.append(text)
                    self._broken.add(base)
        if not bases:
            self.problems.append(
                f"config.json: the weights are to be {codec.name}, but no tensor ends in "
                f"{' or '.join(codec.suffixes)}; if they are not quantized, take the quantization "
                f"out of config.json, and --codec out of the command"
            )

    def _draft(self, rule: Rule, layer: int | None) -> Draft:
        def named(name: str) -> str:
            return name if layer is None else name.replace("{L}", str(layer))

        hf = {named(name): shape for name, shape in rule.hf.items()}
        if isinstance(rule.op, Drop):
            return Draft(rule, layer, hf, (), (), ())
        with blame(f"the rule for {rule.megatron}"):
            shape = forward_shape(rule.op, list(hf.values()))
        megatron = tuple(named(name) for name in (rule.megatron, *rule.also))
        return Draft(rule, layer, hf, megatron, shape, ())

    def _drop(self, draft: Draft, reason: str) -> None:
        for name in draft.hf:
            if self._left.pop(name, None):
                self.dropped.append((name, reason))

    def _take(self, draft: Draft, direction: Direction) -> tuple[Input, ...]:
        """The draft's inputs; empty, and the misfits noted, if they are not all there and right."""
        if direction == "import":
            wanted = dict(draft.hf)
        else:
            present = [name for name in draft.megatron if name in self._left]
            wanted = dict.fromkeys(present or draft.megatron[:1], draft.shape)
        padded = direction != "import" and isinstance(draft.rule.op, PadVocab)
        inputs = [self._take_one(name, shape, padded=padded) for name, shape in wanted.items()]
        whole = [i for i in inputs if i is not None]
        return tuple(whole) if len(whole) == len(inputs) else ()

    def _take_one(self, name: str, shape: tuple[int, ...], *, padded: bool) -> Input | None:
        found = self._left.pop(name, None)
        if found is None:
            if name not in self._broken:
                self._missing += [name + s for s in self._parts_of(name)]
            return None
        if padded and found.spec.shape[1:] == shape[1:]:
            rows = min(found.spec.shape[0], shape[0])
            found = replace(found, spec=replace(found.spec, shape=(rows, *shape[1:])))
        if found.spec.shape != shape:
            self.problems.append(
                f"{name}: has shape {list(found.spec.shape)} where the config asks for "
                f"{list(shape)}; the tensor or the config is another model's"
            )
            return None
        return found

    def _parts_of(self, name: str) -> Sequence[str]:
        """Suffixes under which a missing tensor should have been stored."""
        if self._codec and any(i.codec for i in self._left.values()):
            sibling = name.rsplit(".", 1)[-1]
            if any(i.codec and n.endswith("." + sibling) for n, i in self._left.items()):
                return self._codec.suffixes
        return ("",)

    def _stray_remedy(self, name: str, direction: Direction) -> str:
        for codec in self._known:
            if codec != self._codec and name.endswith(codec.suffixes):
                return (
                    f"it looks like a part of {codec.name}, which config.json does not declare; "
                    f"say --codec {codec.name} if it is"
                )
        if direction in ("export", "reshard"):
            return "remove it, or install the plugin of the model that has it"
        return "remove it if it is not part of the model, or add a rule (docs/plugins.md)"


def _missing_remedy(near: Sequence[str]) -> str:
    if near:
        return f"the checkpoint has {near[0]} in its place; rename it if it is the same tensor"
    return "the checkpoint is incomplete, or its config describes another model"


def house_dtype(drafts: Iterable[Draft], problems: list[str], *, strict: bool) -> str:
    """The element type to write if the user does not say: that of the checkpoint.

    Args:
        drafts: whose inputs count.
        problems: misfits are appended here.
        strict: demand one type throughout, that of most tensors. Otherwise tensors may differ, as
            they do after training, and the narrowest type that holds all of them is taken.
    """
    plain = [i for draft in drafts for i in draft.inputs if i.codec is None]
    counts = Counter(i.spec.dtype for i in plain if i.spec.dtype in FLOATS)
    house = counts.most_common(1)[0][0] if counts and strict else narrowest(counts)
    for found in plain:
        if found.spec.dtype != house if strict else found.spec.dtype not in FLOATS:
            problems.append(
                f"{found.name}: is {found.spec.dtype} where the rest of the checkpoint is {house}; "
                f"store it as {house}"
            )
    return house
