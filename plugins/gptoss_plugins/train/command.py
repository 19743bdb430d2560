"""``gptoss-convert train``: a recipe, run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.device import require_device
from gptoss_convert.errors import ConfigError, UsageError
from gptoss_convert.program import echo_json, registry_of
from gptoss_plugins.gpt_model.installed import require_installed

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainingConfig

SCHEMA = "gptoss-convert.train/1"


@click.command("train")
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
def train_command(
    ctx: click.Context,
    words: tuple[str, ...],
    recipe: str | None,
    file: Path | None,
    device: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a model as a recipe says, with some of its fields changed.

    Run it alone, or with python -m torch.distributed.run --nproc_per_node=N. Goes on from the newest
    checkpoint in checkpoint.load, whatever layout it was saved in; SIGTERM saves and ends with exit
    code 0. Example: train --recipe tiny_pretrain_config dataset.blend=[data/text] train.train_iters=200
    """
    from gptoss_plugins.train.checks import require_sound
    from gptoss_plugins.train.choosing import chosen

    if (recipe is None) == (file is None):
        raise UsageError("say which recipe with --recipe, or which config with --yaml")
    registry = registry_of(ctx)
    config = chosen(registry.recipes(), recipe, file, words)
    world, rank = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    require_sound(config, world)
    _require_what_is_here(config)
    require_device(device)
    lines = _Lines(config, show=rank == 0 and not as_json)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
        from gptoss_plugins.train.run.loop import run
        from gptoss_plugins.train.run.tokens import tokens_of
    tokens, files = tokens_of(config, registry)
    progress = run(config, registry, device=device, tokens=tokens, files=files, tell=lines.tell)
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
                "lines": lines.told,
            }
        )
    else:
        where = f", saved in {config.checkpoint.save}" if config.checkpoint.save else ""
        how = "stopped after" if stopped else "trained"
        click.echo(f"{how} {progress.step} of {config.train.train_iters} steps{where}")


def _require_what_is_here(config: TrainingConfig) -> None:
    require_installed("training", "megatron", extras="train")
    if config.dataset.kind != "pretrain" or config.peft is not None:
        raise ConfigError(
            "only pretraining is here yet: choose a *_pretrain_config recipe (see: recipes)"
        )
    if config.model.context_parallel_size > 1:
        raise ConfigError("model.context_parallel_size: context parallelism is not here yet; use 1")


class _Lines:
    """Figures of the run: on the terminal, in a file of JSON lines, in the result."""

    def __init__(self, config: TrainingConfig, *, show: bool) -> None:
        self.told: list[dict[str, Any]] = []
        self._show, self._total = show, config.train.train_iters
        self._file = config.logger.log_file

    def tell(self, line: dict[str, Any]) -> None:
        """One line."""
        self.told.append(line)
        if self._file:
            with open(self._file, "a") as file:
                file.write(json.dumps(line) + "\n")
        if not self._show:
            return
        at = f"step {line['step']:>6}/{self._total}"
        if "validation_loss" in line:
            click.echo(f"{at}  validation loss {line['validation_loss']:.4f}", err=True)
            return
        click.echo(
            f"{at}  loss {line['loss']:.4f}  lr {line['lr']:.3g}  gradient norm {line['grad_norm']:.3f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s",
            err=True,
        )
