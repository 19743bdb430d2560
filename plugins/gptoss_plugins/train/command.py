"""``gptoss-convert train``: a recipe, run; and ``pretrain``, ``sft``, ``peft``, its short forms."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_convert.device import require_device
from gptoss_convert.errors import ConfigError, UsageError
from gptoss_convert.program import echo_json, registry_of
from gptoss_plugins.gpt_model.installed import require_installed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_convert.types import Recipe
    from gptoss_plugins.train.config import TrainingConfig

SCHEMA = "gptoss-convert.train/1"
_HELP = """{what}

Run it alone, or with python -m torch.distributed.run --nproc_per_node=N. Goes on from the newest
checkpoint in checkpoint.load, whatever layout it was saved in; SIGTERM saves and ends with exit
code 0. Example: {example}
"""
_WHAT = {
    "train": (
        "Train a model as a recipe says, with some of its fields changed.",
        "train --recipe tiny_pretrain_config dataset.blend=[data/text] train.train_iters=200",
    ),
    "pretrain": (
        "Train on running text: train with a *_pretrain_config recipe.",
        "pretrain --recipe tiny dataset.blend=[data/text] train.train_iters=200",
    ),
    "sft": (
        "Fine-tune all weights on questions and answers: train with a *_sft_* recipe.",
        "sft --recipe 20b dataset.dataset_root=data/mine checkpoint.pretrained_checkpoint=DIR",
    ),
    "peft": (
        "Fine-tune adapters (LoRA): train with a *_peft_* recipe.",
        "peft --recipe 20b peft.dim=16 checkpoint.pretrained_checkpoint=DIR",
    ),
}


def _command(kind: str) -> click.Command:
    what, example = _WHAT[kind]

    @click.command(kind, help=_HELP.format(what=what, example=example))
    @click.argument("words", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
    @click.option("--recipe", metavar="NAME", help="One of those that recipes lists.")
    @click.option(
        "--yaml",
        "file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A config in YAML, in place of a recipe.",
    )
    @click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Where to train; CUDA where there is one.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
    @click.option("--debug", is_flag=True, help="Show where an error comes from.")
    @click.pass_context
    def command(
        ctx: click.Context,
        words: tuple[str, ...],
        recipe: str | None,
        file: Path | None,
        device: str | None,
        as_json: bool,
        debug: bool,
    ) -> None:
        if (recipe is None) == (file is None):
            raise UsageError("say which recipe with --recipe, or which config with --yaml")
        _train(ctx, _config(ctx, kind, recipe, file, words), device, as_json=as_json)

    return command


def _config(
    ctx: click.Context, kind: str, recipe: str | None, file: Path | None, words: tuple[str, ...]
) -> TrainingConfig:
    """What the command line says, of the command's kind."""
    from gptoss_plugins.train.choosing import chosen
    from gptoss_plugins.train.dclm import with_dclm

    recipes: Mapping[str, Recipe] = registry_of(ctx).recipes()
    config = chosen(recipes, recipe, file, words, kind=None if kind == "train" else kind)
    return with_dclm(config, os.environ)


def _train(
    ctx: click.Context, config: TrainingConfig, device: str | None, *, as_json: bool
) -> None:
    from gptoss_plugins.train.checks import require_sound
    from gptoss_plugins.train.telling import Telling

    world, rank = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    require_sound(config, world)
    require_installed("training", "megatron", extras="train")
    _require_base(config)
    require_device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
        from gptoss_plugins.train.run.loop import run
    with Telling(config, rank=rank, show=rank == 0 and not as_json) as telling:
        progress = run(config, registry_of(ctx), device=device, tell=telling.tell)
    if rank:
        return
    stopped = progress.step < config.train.train_iters
    if as_json:
        echo_json(
            {
                "schema": SCHEMA,
                "steps": progress.step,
                "samples": progress.samples,
                "finished": not stopped,
                "save": config.checkpoint.save,
                "lines": telling.told,
            }
        )
    else:
        where = f", saved in {config.checkpoint.save}" if config.checkpoint.save else ""
        steps = f"{progress.step} of {config.train.train_iters} steps"
        if telling.told[0]["step"] >= config.train.train_iters:
            click.echo(f"nothing to do: {config.checkpoint.load} has {steps} already")
        else:
            click.echo(f"{'stopped after' if stopped else 'trained'} {steps}{where}")


def _require_base(config: TrainingConfig) -> None:
    if config.peft is not None and config.checkpoint.pretrained_checkpoint is None:
        raise ConfigError(
            "checkpoint.pretrained_checkpoint is null, and adapters are trained on a model; name it"
        )


train_command, *SHORT_FORMS = map(_command, _WHAT)
