"""Targets of an adapter in PEFT's form: ``lora_A`` and ``lora_B`` below every module or parameter."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from gptoss_convert.errors import PlanError
from gptoss_convert.types import TensorSpec
from gptoss_plugins.adapter.finding import Found, halves, strange
from gptoss_plugins.adapter.peft import Filled, PeftSource
from gptoss_plugins.adapter.peft_config import CONFIG
from gptoss_plugins.adapter.table import PREFIX, Line, Target, stored_modules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LAYER = re.compile(rf"{re.escape(PREFIX)}\D*\.(\d{{1,9}})\.")


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
    filled = Filled(source, looking.zeros, looking.factors)
    is_as_stored = not looking.zeros and not looking.factors
    declared = source.declared
    scale = looking.scale or 1.0
    return Found(
        source if is_as_stored else filled,
        tuple(targets),
        declared.rank,
        scale * declared.rank,
        declared.base,
    )


class _Looking:
    """What is found out about one adapter.

    Attributes:
        adapted: lines that it adapts on some layer.
        problems: what is wrong, a sentence each.
        zeros: specs of factors of layers that are not adapted, by name.
        factors: what makes up for a scale that is not the first one's, by name of B.
        scale: that of the first target.

    """

    def __init__(self, source: PeftSource, table: Sequence[Line], layers: int, model: str) -> None:
        self._source, self._table, self._model = source, table, model
        self._specs, self._layers, self._declared = source.specs(), layers, source.declared
        experts = [
            line
            for line in table
            if line.experts and any(map(source.declared.has_parameter, self._all(line)))
        ]
        every = [line for line in table if not line.experts]
        self._names = stored_modules([*every, *experts])
        self.adapted = [
            line
            for line in table
            if (line in experts if line.experts else any(self._has(p) for p in line.parts))
        ]
        self.problems: list[str] = []
        self.zeros: dict[str, TensorSpec] = {}
        self.factors: dict[str, float] = {}
        self.scale: float | None = None

    def _all(self, line: Line) -> list[str]:
        """The names of a line of experts on every layer."""
        (part,) = line.parts
        return [part.replace("{L}", str(layer)) for layer in range(self._layers)]

    def _at(self, part: str, factor: str, layer: int) -> str:
        return f"{self._names[part]}.lora_{factor}.weight".replace("{L}", str(layer))

    def _has(self, part: str) -> bool:
        """Whether a module has an adapter on any layer."""
        return any(
            self._at(part, factor, layer) in self._specs
            for factor in "AB"
            for layer in range(self._layers)
        )

    def require_known_names(self) -> None:
        """Every tensor is half of an adapter that has its other half, of a layer there is.

        Raises:
            PlanError: listing those that are not.

        """
        specs = self._specs
        problems = [*halves(specs, ".lora_A.", ".lora_B.")]
        known = {
            self._at(part, factor, layer)
            for line in self.adapted
            for part in line.parts
            for factor in "AB"
            for layer in range(self._layers)
        }
        for name in specs.keys() - known:
            layer = _LAYER.match(name)
            if layer and int(layer[1]) >= self._layers:
                problems.append(
                    f"{name}: is of layer {layer[1]}, and {self._model} has {self._layers} layers, "
                    f"counted from 0; name the model that the adapter was made for"
                )
            elif ".experts." in name and not any(line.experts for line in self.adapted):
                problems.append(
                    f"{name}: is of a parameter that target_parameters in {CONFIG} does not name; mend "
                    f"the config"
                )
            else:
                problems.append(strange(name, self._table))
        if not specs:
            problems.append("it has no tensors; save the adapter again")
        if problems:
            raise PlanError(str(self._source.path), problems)

    def target(self, line: Line) -> Target | None:
        """How a line is adapted; None, and the problems noted, if that makes no sense."""
        ranks = [self._rank(line, part) for part in line.parts]
        if None in ranks:
            return None
        found = [rank or 0 for rank in ranks]
        if line.experts:
            return Target(line, found[0], is_shared=self._is_shared(line, found[0]))
        if len(found) == 1 or (len(set(found)) == 1 and self._have_one_a(line)):
            return Target(line, found[0])
        return Target(line, sum(found), tuple(found))

    def _rank(self, line: Line, part: str) -> int | None:
        """Of a module or parameter on all layers that have it; 0 if none has."""
        if not line.experts and not self._has(part):
            return 0
        ranks, missing = set(), []
        for layer in range(self._layers):
            a, b = (self._at(part, factor, layer) for factor in "AB")
            name = part.replace("{L}", str(layer))
            if a not in self._specs:
                if self._must_have(line, name, layer):
                    self.problems.append(
                        f"{a}: is missing, and {self._model} has such a layer; name the model that the "
                        f"adapter was made for"
                    )
                missing.append(layer)
                continue
            rank = self._declared.rank_of(name)
            rows = rank * (line.experts or 1)
            if self._specs[a].shape[:1] != (rows,):
                self.problems.append(
                    f"{a}: is {self._specs[a]} where a rank of {rank}"
                    f"{f' for {line.experts} experts' if line.experts else ''} makes {rows} rows; "
                    f"{CONFIG} tells another rank, or {self._model} is another model"
                )
            ranks.add(rank)
            self._note_scale(b, self._declared.scale_of(name))
        if len(ranks) > 1:
            self.problems.append(
                f"{part}: has ranks {sorted(ranks)} on different layers, and Megatron has one for all; "
                f"train it with one rank"
            )
        if self.problems:
            return None
        rank = ranks.pop()
        self._fill(line, part, rank, missing)
        return rank

    def _must_have(self, line: Line, name: str, layer: int) -> bool:
        """Whether the config says that a layer is adapted."""
        if line.experts:
            return self._declared.has_parameter(name)
        if self._declared.layers is not None:
            return layer in self._declared.layers
        return self._declared.has_module(name)

    def _note_scale(self, name: str, scale: float) -> None:
        if self.scale is None:
            self.scale = scale
        if not math.isclose(scale, self.scale, rel_tol=1e-12):
            self.factors[name] = scale / self.scale

    def _fill(self, line: Line, part: str, rank: int, missing: Sequence[int]) -> None:
        present = next(layer for layer in range(self._layers) if layer not in missing)
        dtypes = [self._specs[self._at(part, factor, present)].dtype for factor in "AB"]
        rows, inputs = line.shape
        if not line.experts:
            rows = line.rows[line.parts.index(part)]
        columns = rank * (line.experts or 1)
        for layer in missing:
            for factor, dtype, shape in zip(
                "AB", dtypes, ((columns, inputs), (rows, columns)), strict=True
            ):
                self.zeros[self._at(part, factor, layer)] = TensorSpec(shape, dtype)

    def _have_one_a(self, line: Line) -> bool:
        """Whether all modules of a line have the same A, on every layer."""
        import torch

        for layer in range(self._layers):
            names = [self._at(part, "A", layer) for part in line.parts]
            first, *others = (self._read(name) for name in names)
            if not all(torch.equal(first, other) for other in others):
                return False
        return True

    def _is_shared(self, line: Line, rank: int) -> bool:
        """Whether all experts have the same adapter, on every layer."""
        (part,) = line.parts
        if line.experts < 2:
            return False
        return all(
            self._are_alike(line, self._at(part, "A", layer), self._at(part, "B", layer), rank)
            for layer in range(self._layers)
        )

    def _are_alike(self, line: Line, a: str, b: str, rank: int) -> bool:
        if a in self.zeros:
            return True
        one, two = (self._read(name) for name in (a, b))
        if tuple(one.shape) != (rank * line.experts, line.shape[1]) or two.dim() != 2:
            return False  # of another model, as will be said
        if two.shape[1] != rank * line.experts:
            return False
        each = one.unflatten(0, (line.experts, -1)), two.unflatten(1, (-1, line.experts))
        return bool((each[0] == each[0][:1]).all() and (each[1] == each[1][..., :1]).all())

    def _read(self, name: str) -> Tensor:
        import torch

        return torch.zeros(()) if name in self.zeros else self._source.read(name)
