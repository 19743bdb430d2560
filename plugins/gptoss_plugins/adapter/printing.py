"""What ``gptoss-convert adapter`` tells, for people and for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.layout import EXPERT_AXIS
from gptoss_convert.loss import total
from gptoss_convert.report import print_costs, print_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_convert.conversion import Result
    from gptoss_convert.loss import Loss
    from gptoss_plugins.adapter.opening import Adapter

SCHEMA = "gptoss-convert.adapter/1"


def to_json(
    result: Result, adapter: Adapter, rounding: Mapping[str, Loss] | None = None
) -> dict[str, Any]:
    """Plain values; the schema is described in docs/json.md."""
    found = {
        **result.to_json(),
        "schema": SCHEMA,
        "adapter": {
            "path": str(adapter.logical.source.path),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": [
                {
                    "linear": target.line.linear,
                    "rank": target.rank,
                    "experts": target.line.experts or None,
                    "shared": target.is_shared,
                }
                for target in adapter.targets
            ],
        },
    }
    if rounding is None:
        return found
    told = _named(rounding)
    tensors = [{"name": name, **told[name].to_json()} for name in sorted(told)]
    return {**found, "rounding": {"total": total(rounding.values()).to_json(), "tensors": tensors}}


def print_adapter(result: Result, adapter: Adapter, done: str | None = None) -> None:
    """A line each; ``done`` is what was done, if that is not the direction."""
    print_result(result, done)
    click.echo(_what(adapter))


def print_merge(result: Result, adapter: Adapter, rounding: Mapping[str, Loss]) -> None:
    """The same, and what was lost."""
    print_adapter(result, adapter, "merged")
    lossy = {name: loss for name, loss in _named(rounding).items() if loss.kept != loss.blocks}
    if lossy:
        print_costs("rounding", lossy, "rounded")


def _named(rounding: Mapping[str, Loss]) -> dict[str, Loss]:
    """By the names that checkpoints have: ours say of stacked experts that they are."""
    return {name.removesuffix(EXPERT_AXIS): loss for name, loss in rounding.items()}


def _what(adapter: Adapter) -> str:
    """``LoRA of rank 32 (scale 1) on linear_qkv, linear_fc1 (shared by all experts)``."""
    names = [
        target.line.linear
        + (" (shared by all experts)" if target.is_shared else "")
        + (f" (rank {target.rank})" if target.rank != adapter.rank else "")
        for target in adapter.targets
    ]
    return f"LoRA of rank {adapter.rank} (scale {adapter.scale:g}) on {', '.join(names)}"
