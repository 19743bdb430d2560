"""Who is told a run's figures: the terminal, a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import click

from gptoss_convert.errors import ConfigError
from gptoss_convert.staging import human
from gptoss_plugins.train.plain import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptoss_plugins.train.config import LoggerConfig, TrainingConfig

Line = dict[str, Any]


class Telling:
    """Everybody a config names; on rank 0, and nobody elsewhere.

    Attributes:
        told: all lines so far.

    Raises:
        ConfigError: a package that the config needs is not installed.

    """

    def __init__(self, config: TrainingConfig, *, rank: int, show: bool) -> None:
        self.told: list[Line] = []
        self._config, self._is_first, self._show = config, rank == 0, show
        self._listeners: list[Callable[[Line], None]] = [self.told.append]
        self._stack = contextlib.ExitStack()
        if config.logger.wandb_project and not find_spec("wandb"):
            raise ConfigError(
                "logger.wandb_project needs wandb, which is not installed: "
                "pip install 'gptoss-convert[wandb]', or say logger.wandb_project=null"
            )

    def __enter__(self) -> Self:
        if not self._is_first:
            return self
        logger = self._config.logger
        if self._show:
            self._listeners.append(Terminal(self._config.train.train_iters).tell)
        if logger.log_file:
            self._listeners.append(JsonLines(logger.log_file).tell)
        if logger.tensorboard_dir:
            self._add_tensorboard(logger.tensorboard_dir)
        if logger.wandb_project:
            self._listeners.append(self._stack.enter_context(WandB(self._config)).tell)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def tell(self, line: Line) -> None:
        """One line."""
        for listener in self._listeners:
            listener(line)

    def _add_tensorboard(self, folder: str) -> None:
        if find_spec("tensorboard"):
            self._listeners.append(self._stack.enter_context(TensorBoard(folder)).tell)
        elif self._show:  # every published recipe names a folder, so no reason to stop
            click.echo(
                f"note: nothing is written to {folder}: TensorBoard is not installed "
                f"(pip install 'gptoss-convert[tensorboard]')",
                err=True,
            )


class Terminal:
    """A row per line on stderr."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def tell(self, line: Line) -> None:
        """One line."""
        at = f"step {line['step']:>6}/{self._steps}"
        if "starts_from" in line:
            source = line["starts_from"]
            what = "goes on from" if line["step"] else "starts with the weights of"
            click.echo(
                f"{at}  {what} {source}" if source else f"{at}  starts from random weights",
                err=True,
            )
            return
        if "validation_loss" in line:
            click.echo(f"{at}  validation loss {line['validation_loss']:.4f}", err=True)
            return
        use = "" if line["mfu"] is None else f" ({line['mfu']:.1%} MFU)"
        click.echo(
            f"{at}  loss {line['loss']:.4f}  lr {line['lr']:.3g}  "
            f"gradient norm {line['grad_norm']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  "
            f"{line['tflops']:.3g} TFLOP/s{use}  "
            f"experts {line['expert_load_min']:.2f} to {line['expert_load_max']:.2f} of the mean  "
            f"memory {human(line['peak_bytes'])}",
            err=True,
        )


class JsonLines:
    """An object per line, appended to a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def tell(self, line: Line) -> None:
        """One line."""
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")


class TensorBoard:
    """A curve per figure."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def tell(self, line: Line) -> None:
        """One line."""
        for name, value in _figures(line).items():
            self._writer.add_scalar(name, value, line["step"])


class WandB:
    """A run of a project; offline where there is no key for it."""

    def __init__(self, config: TrainingConfig) -> None:
        import wandb

        logger: LoggerConfig = config.logger
        is_known = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if is_known else "offline")
        self._run: Any = wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=logger.wandb_exp_name,
            dir=logger.wandb_save_dir,
            config=to_plain(config),
            mode=mode,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._run.finish(exit_code=int(error[0] is not None))

    def tell(self, line: Line) -> None:
        """One line."""
        if figures := _figures(line):
            self._run.log(figures, step=line["step"])


def _figures(line: Line) -> Line:
    return {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
