"""Checks that run with every conversion."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert import Finding, PadVocab, Validator, hookimpl
from gptoss_convert.layout import Parameter
from gptoss_convert.types import MegatronSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan, Step
    from gptoss_convert.types import TensorSpec


def complete(plan: ConversionPlan, folder: Path) -> Iterator[Finding]:
    """The finished folder, opened again, holds every planned tensor and no other.

    A writer that lost a shard or a chunk would otherwise go unnoticed until someone loads it.
    """
    from gptoss_convert.convert import open_source

    source = open_source(folder)
    source.check()
    if isinstance(source, MegatronSource):
        source.arrange(dict(_parameters(plan)))
    found = source.specs()
    outputs = [output for step in plan.steps for output in step.outputs]
    wanted = {name: spec for output in outputs for name, spec in output.stored}
    further = {name: output.spec for output in outputs for name in output.also}
    if further.keys() & found.keys():  # a format has the further names, or it has none of them
        wanted |= further
    tables = {o.name for step in plan.steps if _is_padded(step) for o in step.outputs}
    found = {
        name: _cut(spec, wanted.get(name, spec), name in tables) for name, spec in found.items()
    }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            yield Finding(
                "error",
                name,
                f"was to be {wanted.get(name, 'absent')} and is {found.get(name, 'absent')}",
                "run the conversion again, and report this if it comes back",
            )


def _parameters(plan: ConversionPlan) -> Iterator[tuple[str, Parameter]]:
    layers = plan.megatron_config["num_layers"]
    for step in plan.steps:
        for output in step.outputs:
            for name in (output.name, *output.also):
                yield name, Parameter.of(step.rule, name, output.spec.shape, step.layer, layers)


def _is_padded(step: Step) -> bool:
    return isinstance(step.rule.op, PadVocab)


def _cut(found: TensorSpec, wanted: TensorSpec, is_table: bool) -> TensorSpec:
    """A vocabulary without the rows that pad it."""
    if not is_table or not found.shape or found.shape[0] < wanted.shape[0]:
        return found
    return replace(found, shape=(wanted.shape[0], *found.shape[1:]))


@hookimpl
def gptoss_convert_validators() -> Iterator[Validator]:
    """Completeness of what was written."""
    yield Validator("complete", "checkpoint", complete)
