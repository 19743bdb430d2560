"""From what a command line says to a config: a recipe's name or a YAML file, then overrides."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError, blame
from gptoss_plugins.train.files import from_yaml
from gptoss_plugins.train.names import ALIASES
from gptoss_plugins.train.overrides import override, split
from gptoss_plugins.train.plain import from_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.types import Recipe
    from gptoss_plugins.train.config import TrainingConfig


def chosen(
    recipes: Mapping[str, Recipe],
    name: str | None,
    file: Path | None,
    words: Sequence[str],
    kind: str | None = None,
) -> TrainingConfig:
    """The config of a recipe, or of a file, with overrides applied; not checked.

    Args:
        recipes: by name, as ``Registry.recipes`` has them.
        name: of one of them; ``gpt_oss_`` before it and ``_config`` behind may be left out.
        file: a config in YAML, in place of a recipe.
        words: overrides; those that name a parameter of the recipe (``peft`` of the ``finetune``
            recipes) go to it.
        kind: pretrain, sft or peft, if it has to be that; it may be left out of the name, then.

    Raises:
        UsageError: there is not one of the two, or what it names is not there, or does not fit, or is
            of another kind.

    """
    if (name is None) == (file is None):
        raise UsageError(
            "name a recipe or a file, one of the two; `gptoss-convert recipes` lists them"
        )
    if file is not None:
        config = override(from_yaml(file), words)
    else:
        config = _of_recipe(recipes, str(name), words, kind)
    config = _following(config, words)
    found = "peft" if config.peft is not None else config.dataset.kind
    if kind not in (None, found):
        raise UsageError(f"{name or file}: is for {found}; say {found} in place of {kind}")
    return config


def _of_recipe(
    recipes: Mapping[str, Recipe], name: str, words: Sequence[str], kind: str | None
) -> TrainingConfig:
    recipe = find(recipes, name, kind)
    known = inspect.signature(recipe.build).parameters.values()
    takes = {one.name for one in known if one.kind is not one.VAR_KEYWORD}
    pairs = [(word, split(word)) for word in words]
    arguments = dict(pair for _, pair in pairs if pair[0] in takes)
    rest = [word for word, (name, _) in pairs if name not in takes]
    return override(config_of(recipe, **arguments), rest)


def _following(config: TrainingConfig, words: Sequence[str]) -> TrainingConfig:
    """Fields that mean another one with them, unless that is set itself.

    A run that is killed and started again by the same words goes on; tensor parallelism and sequence
    parallelism come together.
    """
    keys = {ALIASES.get(key, key) for key, _ in map(split, words)}
    if "checkpoint.save" in keys and "checkpoint.load" not in keys:
        config = config.having(checkpoint={"load": config.checkpoint.save})
    parallel = "model.tensor_model_parallel_size"
    if parallel in keys and "model.sequence_parallel" not in keys:
        several = config.model.tensor_model_parallel_size > 1
        config = config.having(model={"sequence_parallel": several})
    return config


def config_of(recipe: Recipe, **arguments: object) -> TrainingConfig:
    """What a recipe builds, typed.

    Raises:
        UsageError: it is no training config.
        PluginError: it failed.

    """
    with blame(f"recipe {recipe.name!r}"):
        built = recipe.build(**arguments)
    try:
        return from_plain(built)
    except UsageError as error:
        raise UsageError(f"recipe {recipe.name}: {error}") from None


def find(recipes: Mapping[str, Recipe], name: str, kind: str | None = None) -> Recipe:
    """A recipe by its name, or by the part of it that tells it from others: of a kind, its size.

    Raises:
        UsageError: there is none; with those that begin so, or else the closest.

    """
    for stem in (name, f"{name}_{kind}") if kind else (name,):
        for one in (stem, f"gpt_oss_{stem}", f"{stem}_config", f"gpt_oss_{stem}_config"):
            if one in recipes:
                return recipes[one]
    short = {_core(one): one for one in recipes}
    core = _core(name)
    near = [one for one in short if core and one.startswith(core)]
    near = near or difflib.get_close_matches(core, short, 1)
    *others, last = sorted(short[one] for one in near) or [""]
    hint = f"did you mean {', '.join(others)}{' or ' if others else ''}{last}? " if last else ""
    raise UsageError(f"{name}: there is no such recipe; {hint}`gptoss-convert recipes` lists them")


def _core(name: str) -> str:
    return name.removeprefix("gpt_oss_").removesuffix("_config")
