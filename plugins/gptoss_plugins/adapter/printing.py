"""What ``gptoss-convert adapter`` tells, for people and for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

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
    tensors = [{"name": name, **rounding[name].to_json()} for name in sorted(rounding)]
    return {**found, "rounding": {"total": total(rounding.values()).to_json(), "tensors": tensors}}


def print_adapter(result: Result, adapter: Adapter, done: str | None = None) -> None:
    """A line each; ``done`` is what was done, if that is not the direction."""
    print_result(result, done)
    click.echo(_what(adapter))


def print_merge(result: Result, adapter: Adapter, rounding: Mapping[str, Loss]) -> None:
    """The same, and what was lost."""
    print_adapter(result, adapter, "merged")
    lossy = {name: loss for name, loss in rounding.items() if loss.kept != loss.blocks}
    if lossy:
        print_costs("rounding", lossy, "rounded")


def _what(adapter: Adapter) -> str:
    """``LoRA of rank 32 (scale 1) on linear_qkv, linear_fc1 (shared by all experts)``."""
    names = [
        target.line.linear
        + (" (shared by all experts)" if target.is_shared else "")
        + (f" (rank {target.rank})" if target.rank != adapter.rank else "")
        for target in adapter.targets
    ]
    return f"LoRA of rank {adapter.rank} (scale {adapter.scale:g}) on {', '.join(names)}"
