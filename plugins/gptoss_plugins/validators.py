"""Checks that run with every conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Finding, Validator, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan


def complete(plan: ConversionPlan, folder: Path) -> Iterator[Finding]:
    """The finished folder, opened again, holds every planned tensor and no other.

    A writer that lost a shard or a chunk would otherwise go unnoticed until someone loads it.
    """
    from gptoss_convert.convert import open_source

    source = open_source(folder)
    source.check()
    found = source.specs()
    outputs = [output for step in plan.steps for output in step.outputs]
    wanted = {name: spec for output in outputs for name, spec in output.stored}
    wanted |= {name: output.spec for output in outputs for name in output.also}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            yield Finding(
                "error",
                name,
                f"was to be {wanted.get(name, 'absent')} and is {found.get(name, 'absent')}",
                "run the conversion again, and report this if it comes back",
            )


@hookimpl
def gptoss_convert_validators() -> Iterator[Validator]:
    """Completeness of what was written."""
    yield Validator("complete", "checkpoint", complete)
