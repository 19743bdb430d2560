"""Targets of an adapter in PEFT's form: ``lora_A`` and ``lora_B`` below every module or parameter."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, cast

from gptoss_convert.errors import PlanError
from gptoss_plugins.adapter.filled import Filled, Made, Pair, padded, scaled, stored, turned, zeros
from gptoss_plugins.adapter.finding import Found, halves, strange
from gptoss_plugins.adapter.peft_config import CONFIG
from gptoss_plugins.adapter.table import PREFIX, Line, Target, stored_modules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gptoss_plugins.adapter.peft import PeftSource

_LAYER = re.compile(rf"{re.escape(PREFIX)}\D*\.(\d{{1,9}})\.")
_FACTORS = (".lora_A.weight", ".lora_B.weight")


def in_peft(source: PeftSource, table: Sequence[Line], layers: int, model: str) -> Found:
    """Look at an adapter.

    Args:
        source: of its tensors.
        table: what can be adapted.
        layers: how many the model has.
        model: how it is called, for messages.

    Raises:
        ConfigError: its config does not go with its tensors.
        PlanError: it is not for this model, or is half an adapter.

    """
    looking = _Looking(source, table, layers, model)
    looking.require_known_names()
    targets = [target for line in looking.adapted if (target := looking.target(line))]
    if looking.problems:
        raise PlanError(str(source.path), looking.problems)
    filled = Filled(source, looking.made, is_wide=looking.is_scaled)
    declared = source.declared
    is_usual = looking.scale == declared.alpha / declared.rank
    return Found(
        filled if looking.made else source,
        tuple(targets),
        declared.rank,
        declared.alpha if is_usual else (looking.scale or 1.0) * declared.rank,
        declared.base,
    )


class _Looking:
    """What is found out about one adapter.

    Attributes:
        adapted: lines that it adapts on some layer.
        problems: what is wrong, a sentence each.
        made: tensors to be offered that are not stored so, by name.
        scale: that of the first target; a B of another scale makes up for it.
        is_scaled: whether there is one.

    """

    def __init__(self, source: PeftSource, table: Sequence[Line], layers: int, model: str) -> None:
        self._source, self._table, self._model = source, table, model
        self._specs, self._layers, self._declared = source.specs(), layers, source.declared
        experts = [line for line in table if line.experts and any(self._expert_layers(line))]
        every = [line for line in table if not line.experts]
        self._names = stored_modules([*every, *experts])
        self._own_names = [  # of each layer, on which fewer parameters may be adapted
            stored_modules([*every, *(line for line in experts if self._is_adapted(line, layer))])
            for layer in range(layers)
        ]
        self.adapted = [
            line
            for line in table
            if (line in experts if line.experts else any(self._has(p) for p in line.parts))
        ]
        self._is_turned = any(self._has_turned(line) for line in self.adapted)
        self.problems: list[str] = []
        self.made: dict[str, Made] = {}
        self.scale: float | None = None
        self.is_scaled = False

    def _expert_layers(self, line: Line) -> list[bool]:
        """Whether the config names a line of experts, on every layer."""
        return [self._is_adapted(line, layer) for layer in range(self._layers)]

    def _is_adapted(self, line: Line, layer: int) -> bool:
        (part,) = line.parts
        return self._declared.has_parameter(part.replace("{L}", str(layer)))

    def _at(self, part: str, factor: str, layer: int) -> str:
        """The name that a factor is offered by, alike on all layers."""
        return f"{self._names[part]}.lora_{factor}.weight".replace("{L}", str(layer))

    def _stored(self, part: str, factor: str, layer: int) -> str | None:
        """The name that it is stored by; None if it is not there."""
        owner = self._own_names[layer].get(part)
        name = f"{owner}.lora_{factor}.weight".replace("{L}", str(layer))
        return name if owner is not None and name in self._specs else None

    def _has(self, part: str) -> bool:
        """Whether a module has an adapter on any layer."""
        layers = range(self._layers)
        return any(self._stored(part, factor, layer) for factor in "AB" for layer in layers)

    def _has_turned(self, line: Line) -> bool:
        """Whether experts' inputs were taken for outputs: some versions of PEFT and transformers together
        do not know that GPT-OSS keeps them the other way round. Of square weights nothing tells.
        """
        rows, inputs = line.shape
        if not line.experts or rows == inputs:
            return False
        (part,) = line.parts
        ends = [
            (self._specs[a].shape[1:], self._specs[b].shape[:1])
            for layer in range(self._layers)
            if (a := self._stored(part, "A", layer)) and (b := self._stored(part, "B", layer))
        ]
        return bool(ends) and all(end == ((rows,), (inputs,)) for end in ends)

    def require_known_names(self) -> None:
        """Every tensor is half of an adapter that has its other half, of a layer there is, and the config
        says that it is there.

        Raises:
            PlanError: listing those that are not.

        """
        specs = self._specs
        problems = [*halves(specs, ".lora_A.", ".lora_B.")]
        known = set()
        for line in self.adapted:
            for part in line.parts:
                for layer in range(self._layers):
                    both = [self._stored(part, factor, layer) for factor in "AB"]
                    found = [one for one in both if one is not None]
                    known.update(found)
                    name = part.replace("{L}", str(layer))
                    if line.experts or self._declared.has_module(name, layer) is not False:
                        continue
                    problems += [
                        f"{one}: is there, and target_modules, exclude_modules and "
                        f"layers_to_transform in {CONFIG} leave it out; mend the config"
                        for one in found
                    ]
        problems += [self._unknown(name) for name in sorted(specs.keys() - known)]
        if not specs:
            problems.append("it has no tensors; save the adapter again")
        if problems:
            raise PlanError(str(self._source.path), problems)

    def _unknown(self, name: str) -> str:
        """What is wrong with a tensor."""
        layer = _LAYER.match(name)
        if not name.startswith(PREFIX) or not name.endswith(_FACTORS):
            return (
                f"{name}: is no name that PEFT gives a tensor of a plain LoRA, {PREFIX}[module]"
                f"{_FACTORS[0]}; save the adapter with its save_pretrained"
            )
        if layer and int(layer[1]) >= self._layers:
            return (
                f"{name}: is of layer {layer[1]}, and {self._model} has {self._layers} layers, "
                f"counted from 0; name the model that the adapter was made for"
            )
        if ".experts." in name:
            return (
                f"{name}: is of a parameter that target_parameters in {CONFIG} does not name; mend "
                f"the config"
            )
        return strange(name, [part for line in self._table for part in line.parts])

    def target(self, line: Line) -> Target | None:
        """How a line is adapted; None, and the problems noted, if that makes no sense."""
        ranks = [self._rank(line, part) for part in line.parts]
        if self.problems:
            return None
        if line.experts:
            return Target(line, ranks[0], is_shared=self._is_shared(line))
        if len(ranks) == 1 or (len(set(ranks)) == 1 and self._have_one_a(line)):
            return Target(line, ranks[0])
        return Target(line, sum(ranks), tuple(ranks))

    def _rank(self, line: Line, part: str) -> int:
        """Of a module or parameter, the highest of all layers; 0 if none has any."""
        ranks: dict[int, int] = {}
        for layer in range(self._layers):
            name = part.replace("{L}", str(layer))
            if self._stored(part, "A", layer) is None:
                if self._must_have(line, name, layer):
                    self.problems.append(
                        f"{self._at(part, 'A', layer)}: is missing, though {CONFIG} tells of it and "
                        f"{self._model} has such a layer; save the adapter again, or name the model "
                        f"that it was made for"
                    )
                continue
            ranks[layer] = self._declared.rank_of(name)
            self._require_rank(line, part, layer, ranks[layer])
        if not ranks or self.problems:
            return 0
        most = max(ranks.values())
        dtypes = [spec.dtype for spec in self._pair(line, part, next(iter(ranks))).specs]
        for layer in range(self._layers):
            if layer in ranks:
                pair = self._pair(line, part, layer)
                if ranks[layer] < most:
                    pair = padded(pair, line.experts or 1, most)
                scale = self._declared.scale_of(part.replace("{L}", str(layer)))
                pair = self._at_one_scale(pair, scale)
            else:
                rows, inputs = line.shape
                if not line.experts:
                    rows = line.rows[line.parts.index(part)]
                pair = zeros(rows, inputs, most * (line.experts or 1), dtypes)
            for factor, made in zip("AB", pair, strict=True):
                if made.stored != (name := self._at(part, factor, layer)):
                    self.made[name] = made
        return most

    def _require_rank(self, line: Line, part: str, layer: int, rank: int) -> None:
        """Note factors that are of another rank than the config says."""
        size = rank * (line.experts or 1)
        for factor, dim, axis in (("A", 0, "rows"), ("B", 1, "columns")):
            name = cast("str", self._stored(part, factor, layer))
            spec = self._specs[name]
            if len(spec.shape) == 2 and spec.shape[dim] == size:
                continue
            self.problems.append(
                f"{name}: is {spec} where a rank of {rank}"
                f"{f' for {line.experts} experts' if line.experts else ''} makes {size} {axis}; "
                f"{CONFIG} tells another rank, or {self._model} is another model"
            )

    def _must_have(self, line: Line, name: str, layer: int) -> bool:
        """Whether the config says that a layer is adapted."""
        if line.experts:
            return self._declared.has_parameter(name)
        return self._declared.has_module(name, layer) is True

    def _pair(self, line: Line, part: str, layer: int) -> Pair:
        """What is stored of a layer."""
        names = [cast("str", self._stored(part, factor, layer)) for factor in "AB"]
        pair = stored(self._source, *names)
        return turned(pair, line.experts) if line.experts and self._is_turned else pair

    def _at_one_scale(self, pair: Pair, scale: float) -> Pair:
        """B takes up the quotient of its scale and the first one's."""
        if self.scale is None:
            self.scale = scale
        if math.isclose(scale, self.scale, rel_tol=1e-12):
            return pair
        self.is_scaled = True
        return scaled(pair, scale / self.scale)

    def _have_one_a(self, line: Line) -> bool:
        """Whether all modules of a line have the same A, on every layer."""
        import torch

        for layer in range(self._layers):
            first, *others = (self._read(part, "A", layer) for part in line.parts)
            if not all(torch.equal(first, other) for other in others):
                return False
        return True

    def _is_shared(self, line: Line) -> bool:
        """Whether all experts have the same adapter, on every layer."""
        (part,), experts = line.parts, line.experts
        if experts < 2:
            return False
        for layer in range(self._layers):
            a, b = (self._read(part, factor, layer) for factor in "AB")
            each = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts))
            if (each[0] != each[0][:1]).any() or (each[1] != each[1][..., :1]).any():
                return False
        return True

    def _read(self, part: str, factor: str, layer: int) -> Tensor:
        name = self._at(part, factor, layer)
        made = self.made.get(name)
        return made.make() if made else self._source.read(name)
