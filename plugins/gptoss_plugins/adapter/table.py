"""The mapping table of an adapter, made from that of its model: two lines, A and B, for each of the
model's that is adapted. Names are PEFT's on the one side, Megatron-Bridge's on the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptoss_convert.errors import blame
from gptoss_convert.layout import EXPERT_AXIS
from gptoss_convert.ops import COPY, forward_shape
from gptoss_convert.types import Rule, Shard
from gptoss_plugins.adapter.ops import (
    BlockB,
    ExpertA,
    ExpertB,
    OneA,
    PadRank,
    SharedA,
    SharedB,
    StackedA,
    swaps,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gptoss_convert.types import Config, ModelFamily

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PREFIX = "base_model.model."  # what PEFT puts before the model's own names
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Line:
    """A line of the model's table that can be adapted.

    Attributes:
        rule: the line.
        linear: Megatron's name of the linear, one of LINEARS.
        shape: ``[out, in]`` of one expert's weight as Megatron has it.
        experts: how many there are; 0 if it has none.

    """

    rule: Rule
    linear: str
    shape: tuple[int, int]
    experts: int

    @property
    def module(self) -> str:
        """Megatron's name of the linear, ``{L}`` for the layer."""
        return self.rule.megatron.removesuffix(EXPERT_AXIS).removesuffix(_WEIGHT)

    @property
    def rows(self) -> tuple[int, ...]:
        """Outputs of each of the Hugging Face modules."""
        return tuple(shape[0] for shape in self.rule.hf.values())

    @property
    def parts(self) -> tuple[str, ...]:
        """What PEFT targets: modules; of experts, the parameter."""
        return tuple(name.removesuffix(_WEIGHT) for name in self.rule.hf)


def lines(family: ModelFamily, config: Config) -> list[Line]:
    """The lines of a model's table that adapters are known for."""
    found = []
    with blame(f"model family {family.name}"):
        for rule in family.rules(config):
            name = rule.megatron.removesuffix(EXPERT_AXIS)
            linear = name.removesuffix(_WEIGHT).rpartition(".")[2]
            if not (name.endswith(_WEIGHT) and linear in LINEARS and "{L}" in name):
                continue
            *lead, rows, inputs = forward_shape(rule.op, list(rule.hf.values()))
            if not lead and swaps(rule.op):
                continue  # no nn.Linear, so PEFT has another layout for it
            found.append(Line(rule, linear, (rows, inputs), lead[0] if lead else 0))
    return found


@dataclass(frozen=True)
class Target:
    """A line that is adapted, and how.

    Attributes:
        line: of the model's table.
        rank: of the adapter as Megatron has it.
        ranks: of each Hugging Face module, where each has an A of its own; () where one A is shared.
        is_shared: whether all experts of a layer have the same adapter.
        padded: the rank that Megatron's factors have zeros up to; 0 for none.

    """

    line: Line
    rank: int
    ranks: tuple[int, ...] = ()
    is_shared: bool = False
    padded: int = 0

    def name(self, factor: str) -> str:
        """Megatron's name of ``linear_in`` (A) or ``linear_out`` (B)."""
        module, lead = self.line.module, ""
        if self.line.experts and self.is_shared:  # in checkpoints experts' keys say it twice
            module = module.replace(".experts.", ".experts.experts.")
        elif self.line.experts:
            lead = EXPERT_AXIS
        return f"{module}.adapter.{factor}{_WEIGHT}{lead}"


def rules(targets: Iterable[Target]) -> Iterator[Rule]:
    """The adapter's table."""
    every = list(targets)
    names = stored_modules(target.line for target in every)
    for target in every:
        made = _of_experts(target, names) if target.line.experts else _of_modules(target, names)
        for rule, dim in zip(made, (-2, -1), strict=True):
            if target.padded > target.rank:
                yield replace(rule, op=PadRank(rule.op, target.rank, target.padded, dim))
            else:
                yield rule


def stored_modules(adapted: Iterable[Line]) -> dict[str, str]:
    """What PEFT targets -> the module that its factors are stored under, its prefix included.

    A parameter's are those of a wrapper around its module. Several parameters of one module have
    wrappers around wrappers, the first one innermost; ``base_layer`` is what a wrapper holds.
    """
    found: dict[str, str] = {}
    wrapped: dict[str, list[str]] = {}
    for line in adapted:
        for part in line.parts:
            if line.experts:
                wrapped.setdefault(part.rpartition(".")[0], []).append(part)
            else:
                found[part] = PREFIX + part
    for owner, parts in wrapped.items():
        for depth, part in enumerate(reversed(parts)):
            found[part] = PREFIX + owner + ".base_layer" * depth
    return found


def _of_modules(target: Target, names: Mapping[str, str]) -> Iterator[Rule]:
    line, (_, inputs) = target.line, target.line.shape
    ranks = target.ranks or (target.rank,) * len(line.parts)
    each = [(names[p], n, r) for p, n, r in zip(line.parts, line.rows, ranks, strict=True) if r]
    a = {f"{name}.lora_A{_WEIGHT}": (rank, inputs) for name, _, rank in each}
    b = {f"{name}.lora_B{_WEIGHT}": (rows, rank) for name, rows, rank in each}
    shard = line.rule.shard
    carry_a = StackedA(ranks) if target.ranks else OneA(len(each)) if len(each) > 1 else COPY
    carry_b = BlockB(line.rule.op, line.rows, ranks) if target.ranks else line.rule.op
    yield Rule(a, target.name("linear_in"), carry_a, _only(shard, Shard.ROW))
    yield Rule(b, target.name("linear_out"), carry_b, _only(shard, Shard.COLUMN, Shard.GATED))


def _of_experts(target: Target, names: Mapping[str, str]) -> Iterator[Rule]:
    line, (rows, inputs), experts = target.line, target.line.shape, target.line.experts
    (part,), shard = line.parts, line.rule.shard
    a, b = (f"{names[part]}.lora_{factor}{_WEIGHT}" for factor in "AB")
    carry_a = SharedA(experts) if target.is_shared else ExpertA(experts)
    carry_b = (SharedB if target.is_shared else ExpertB)(line.rule.op, experts)
    columns = target.rank * experts
    yield Rule({a: (columns, inputs)}, target.name("linear_in"), carry_a, _only(shard, Shard.ROW))
    yield Rule(
        {b: (rows, columns)},
        target.name("linear_out"),
        carry_b,
        _only(shard, Shard.COLUMN, Shard.GATED),
    )


def _only(shard: Shard, *cuts: Shard) -> Shard:
    """How a factor is cut: as the weight if that is along the factor's own dim."""
    return shard if shard in cuts else Shard.REPLICATED


def adapter_family(family: ModelFamily, targets: Iterable[Target]) -> ModelFamily:
    """The family that an adapter belongs to, as its model's does to ``family``."""
    table = list(rules(targets))
    return replace(family, name=f"{family.name} adapter", rules=lambda _: table, unquantized=())
