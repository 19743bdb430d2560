"""Training: recipes, and ``gptoss-convert recipes``, which lists and shows them (docs/recipes.md)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import Recipe, hookimpl
from gptoss_convert.errors import UsageError
from gptoss_convert.program import echo_json, registry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptoss_plugins.train.config import TrainingConfig


@click.command("recipes")
@click.argument("words", nargs=-1, metavar="[NAME] [SECTION.FIELD=VALUE]...")
@click.option(
    "--yaml",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Show this config in YAML, in place of a recipe's.",
)
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
@click.pass_context
def show_recipes(  # not `recipes`: importing the module of that name would take its place
    ctx: click.Context, words: tuple[str, ...], file: Path | None, as_json: bool, debug: bool
) -> None:
    """List the training recipes, or show one as YAML.

    NAME is one of the list. Overrides behind it change its fields, as in train: train.train_iters=100
    optimizer.lr=1e-4. What would keep the config from running is told on stderr.
    """
    from gptoss_plugins.train.listing import SCHEMA, described, print_recipes

    offered = registry_of(ctx).recipes()
    if not words and file is None:
        entries = list(offered.values())
        if as_json:
            echo_json({"schema": SCHEMA, "recipes": list(described(entries))})
        else:
            print_recipes(entries)
        return
    name = words[0] if words and "=" not in words[0] else None
    if name is None and file is None:
        raise UsageError(f"{words[0]}: say before it which recipe it is to change")
    _show(offered, name, file, words[name is not None :], as_json=as_json)


def _show(
    offered: dict[str, Recipe],
    name: str | None,
    file: Path | None,
    words: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    """One config: as YAML, and its problems; or both as JSON."""
    from gptoss_plugins.train.checks import check
    from gptoss_plugins.train.choosing import chosen, find
    from gptoss_plugins.train.files import to_yaml
    from gptoss_plugins.train.listing import SCHEMA, facts
    from gptoss_plugins.train.plain import to_plain

    config = chosen(offered, name, file, words)
    problems = list(check(config))
    if as_json:
        recipe = find(offered, name) if name else None
        entry: dict[str, Any] = {
            "name": recipe.name if recipe else str(file),
            "summary": recipe.summary if recipe else "",
            "problem": None,
            **facts(config),
            "config": to_plain(config),
            "problems": problems,
        }
        echo_json({"schema": SCHEMA, "recipes": [entry]})
        return
    click.echo(to_yaml(config), nl=False)
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """``train`` with its short forms, and ``recipes``."""
    from gptoss_plugins.train.command import SHORT_FORMS, train_command

    yield train_command
    yield from SHORT_FORMS
    yield show_recipes


@hookimpl
def gptoss_convert_recipes() -> Iterator[Recipe]:
    """Those of Megatron-Bridge for GPT-OSS, and tiny ones."""
    from gptoss_plugins.train.recipes import RECIPES

    for make in RECIPES:
        summary = (make.__doc__ or "").splitlines()[0]
        yield Recipe(make.__name__, summary, build=_as_plain(make))


def _as_plain(make: Callable[..., TrainingConfig]) -> Callable[..., dict[str, Any]]:
    """A recipe that gives plain values; it takes the same parameters."""

    @functools.wraps(make)
    def build(**arguments: Any) -> dict[str, Any]:
        from gptoss_plugins.train.plain import to_plain

        found: dict[str, Any] = to_plain(make(**arguments))
        return found

    return build
