"""The command that is to be launched: what kind of processes it takes, how many, and where it writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.program import layout_of, registry_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_plugins.train.config import TrainingConfig

# ranks talk to each other, shares have nothing in common but the folder, and alone is alone
Kind = Literal["ranks", "shares", "alone"]

_TRAINING = ("train", "pretrain", "sft", "peft")
# Conversions, and which of their options names the folder that they make.
_TARGETS = {
    "import": "megatron_path",
    "export": "hf_path",
    "quantize": "hf_path",
    "dequantize": "hf_path",
    "reshard": "output",
}
_AXES = ("tp", "pp", "ep")
_PROGRAM = "gptoss-convert"


@dataclass(frozen=True)
class Inner:
    """A command, looked at and not run.

    Attributes:
        words: its words, from the command's name on.
        kind: how its processes are started.
        need: processes that it takes at least; any multiple will do for ranks.
        layout: what makes it need them, in words.
        name: of the job.
        target: folder that it writes, if it says so.
        config: of training.

    """

    words: tuple[str, ...]
    kind: Kind
    name: str
    need: int = 1
    layout: str = "one rank"
    target: Path | None = None
    config: TrainingConfig | None = None

    @property
    def begins_anew(self) -> bool:
        """Whether it is a training that, run again, does not go on from what it saved."""
        if self.config is None:
            return False
        checkpoint = self.config.checkpoint
        return not checkpoint.save or checkpoint.load != checkpoint.save


def look_at(ctx: click.Context, words: Sequence[str]) -> Inner:
    """Read a command line as the command itself would, options and all.

    Raises:
        UsageError: there is none, or it does not make sense.

    """
    words = tuple(words[1:] if words and Path(words[0]).name == _PROGRAM else words)
    if not words or words[0].startswith("-"):
        raise UsageError(
            "say after -- which command is to be launched: gptoss-convert launch slurm -- train ..."
        )
    name, options, command = _parsed(ctx, words)
    if name in ("launch", "chat"):
        raise UsageError(f"{name} cannot be launched; say a command that asks for nothing")
    if name in _TRAINING:
        return _training(ctx, words, options)
    if name in _TARGETS:
        target = options[_TARGETS[name]]
        return Inner(words, "shares", name, target=target and Path(target))
    if name != "plan" and all(axis in options for axis in _AXES):
        layout = layout_of(**{axis: options[axis] for axis in (*_AXES, "etp") if axis in options})
        return Inner(words, "ranks", name, layout.world, str(layout))
    return Inner(words, "alone", "-".join(command))


def _parsed(
    ctx: click.Context, words: Sequence[str]
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The command's name, its options, and its name with those of the groups around it."""
    root = ctx.find_root()
    found, around = root.command, root
    names: list[str] = []
    while isinstance(found, click.Group):
        if len(names) == len(words):
            raise UsageError(f"{' '.join(names)}: say which of its commands is to be launched")
        word = words[len(names)]
        inner = found.get_command(around, word)
        if inner is None:
            lists = " ".join([_PROGRAM, *names, "--help"])
            raise UsageError(f"{word}: there is no such command; `{lists}` lists them")
        names.append(word)
        found = inner
        if isinstance(found, click.Group):
            around = click.Context(found, info_name=word, parent=around)
    options = found.make_context(names[-1], list(words[len(names) :]), parent=around).params
    return names[0], options, tuple(names)


def _training(ctx: click.Context, words: tuple[str, ...], options: dict[str, Any]) -> Inner:
    from gptoss_plugins.train.choosing import chosen
    from gptoss_plugins.train.ranks import layout_of as layout_of_model
    from gptoss_plugins.train.ranks import smallest_world

    kind = None if words[0] == "train" else words[0]
    recipes = registry_of(ctx).recipes()
    config = chosen(recipes, options["recipe"], options["file"], options["words"], kind=kind)
    model = config.model
    layout = str(layout_of_model(model))
    if model.context_parallel_size > 1:
        layout = f"{layout}, cp {model.context_parallel_size}"
    save = config.checkpoint.save
    return Inner(
        words,
        "ranks",
        "-".join([words[0], options["recipe"] or options["file"].stem]),
        smallest_world(model),
        layout,
        Path(save) if save else None,
        config,
    )


def workspace() -> Path:
    """Where models and results are."""
    return Path(os.environ.get("WORKSPACE") or "/workspace")
