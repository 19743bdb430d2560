"""What ``gptoss-convert recipes`` shows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import ConvertError
from gptoss_plugins.train.architecture import parameters
from gptoss_plugins.train.choosing import config_of
from gptoss_plugins.train.config.precision import label
from gptoss_plugins.train.ranks import layout_of, smallest_world

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gptoss_convert.types import Recipe
    from gptoss_plugins.train.config import TrainingConfig

SCHEMA = "gptoss-convert.recipes/1"


def facts(config: TrainingConfig) -> dict[str, Any]:
    """What tells a recipe from others, as plain values (docs/json.md)."""
    model, layout = config.model, layout_of(config.model)
    try:
        weights = parameters(model)
    except ConvertError:  # sizes of an override that make no model
        weights = None
    return {
        "size": model.size,
        "parameters": weights,
        "data": config.dataset.kind,
        "peft": config.peft is not None,
        "precision": label(config.mixed_precision),
        "layout": {
            **{axis: getattr(layout, axis) for axis in ("tp", "pp", "vpp", "ep", "etp")},
            "cp": model.context_parallel_size,
        },
        "processes": smallest_world(model),
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "sequence_length": model.seq_length,
        "train_iters": config.train.train_iters,
    }


def described(recipes: Iterable[Recipe]) -> Iterator[dict[str, Any]]:
    """Every recipe; of one that is no training config of ours (``problem`` says why) only the name."""
    for recipe in recipes:
        entry: dict[str, Any] = {"name": recipe.name, "summary": recipe.summary, "problem": None}
        try:
            entry |= facts(config_of(recipe))
        except ConvertError as error:
            entry["problem"] = str(error)
        yield entry


def print_recipes(recipes: Iterable[Recipe]) -> None:
    """A row per recipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("sequence", justify="right", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("what")
    for entry in described(recipes):
        table.add_row(*_cells(entry))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["problem"]:
        return [entry["name"], *[""] * 6, f"{entry['summary']} (not for `train`)"]
    layout = " ".join(f"{axis}{size}" for axis, size in entry["layout"].items() if size > 1)
    return [
        entry["name"],
        entry["size"],
        str(entry["processes"]),
        layout,
        f"{entry['global_batch_size']}/{entry['micro_batch_size']}",
        str(entry["sequence_length"]),
        entry["precision"],
        entry["summary"],
    ]
