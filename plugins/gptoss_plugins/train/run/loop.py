"""A whole run: build, load, step after step, evaluate, save, stop."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import Choice
from gptoss_plugins.gpt_model.filling import fill
from gptoss_plugins.gpt_model.world import world_of
from gptoss_plugins.train.architecture import hf_config, megatron_fields
from gptoss_plugins.train.ranks import layout_of
from gptoss_plugins.train.run.data import Tokens, batches_of, build_datasets
from gptoss_plugins.train.run.saving import Progress, last_checkpoint, resume, save
from gptoss_plugins.train.run.step import evaluate, train_step
from gptoss_plugins.train.run.trainee import build_trainee, data_rank, rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptoss_convert.registry import Registry
    from gptoss_plugins.train.config import TrainingConfig
    from gptoss_plugins.train.run.trainee import Trainee


def run(
    config: TrainingConfig,
    registry: Registry,
    *,
    device: str | None,
    tokens: Tokens,
    files: Mapping[str, bytes],
    tell: Callable[[dict[str, Any]], None],
) -> Progress:
    """Train as a config says. All ranks call this together.

    Args:
        config: the run; it has been checked.
        registry: the plugins.
        device: ``cpu`` or ``cuda``; CUDA where there is one, if None.
        tokens: what the data's tokens are.
        files: the tokenizer's files, kept in every checkpoint: name -> bytes.
        tell: gets a line of figures on rank 0.

    Returns:
        how far it came: all steps, or those before it was told to stop.

    Raises:
        ConvertError: the data, the checkpoint or the layout does not fit.

    """
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it tells what it is made of
    with ExitStack() as stack:
        place = stack.enter_context(world_of(layout_of(config.model), device))
        stop = stack.enter_context(_Stop(config.train.exit_signal_handler))
        trainee, progress = _begin(config, registry, place)
        train, valid = build_datasets(config, tokens)
        companions = {
            "config.json": json.dumps(hf_config(config.model), indent=2).encode(),
            **files,
        }

        def keep() -> None:
            if config.checkpoint.save:
                save(
                    Path(config.checkpoint.save),
                    trainee,
                    progress,
                    companions,
                    with_optimizer=config.checkpoint.save_optim,
                    keep=config.checkpoint.most_recent_k,
                )

        saved = progress
        while progress.step < config.train.train_iters:
            progress = _step(config, trainee, train, progress, place, tell)
            step = progress.step
            if (
                valid is not None
                and config.train.eval_iters
                and step % config.train.eval_interval == 0
            ):
                _evaluate(config, trainee, valid, step, place, tell)
            if step % config.checkpoint.save_interval == 0:
                keep()
                saved = progress
            if stop.is_wanted(place):
                break
        if saved != progress:
            keep()
        return progress


def _begin(
    config: TrainingConfig, registry: Registry, place: torch.device
) -> tuple[Trainee, Progress]:
    """The run's own last checkpoint, or the weights to start from, or random ones."""
    where = config.checkpoint
    last = last_checkpoint(Path(where.load) if where.load else None, where.ckpt_step)
    start = None if last else where.pretrained_checkpoint
    trainee = build_trainee(config, registry, place, random_weights=not (last or start))
    if last and not where.finetune:
        return trainee, resume(last, trainee, with_optimizer=where.load_optim)
    if start or last:
        checkpoint = open_logical(start or str(last), registry, Choice())
        ours, theirs = megatron_fields(config.model), checkpoint.fields
        differ = sorted(k for k in ours if k in theirs and ours[k] != theirs[k])
        differ = [k for k in differ if not k.startswith("moe_router_load")]
        if differ:
            raise CheckpointError(
                f"{start or last}: is another model than model.size={config.model.size} "
                f"({', '.join(differ)} differ); name the right size or checkpoint"
            )
        fill(trainee.live, checkpoint)
        trainee.optimizer.reload_model_params()
    return trainee, Progress()


def _step(
    config: TrainingConfig,
    trainee: Trainee,
    data: Any,
    progress: Progress,
    place: torch.device,
    tell: Callable[[dict[str, Any]], None],
) -> Progress:
    size = config.train.global_batch_size
    started = time.monotonic()
    used = rates(trainee)
    batches = batches_of(data, progress.samples, size, config, data_rank(), place)
    found = train_step(trainee, batches)
    took = time.monotonic() - started
    step = progress.step + 1
    if not math.isfinite(found.loss):
        raise UsageError(
            f"step {step}: the loss is {found.loss}; lower optimizer.lr, or look at the data"
        )
    if dist.get_rank() == 0 and (step % config.logger.log_interval == 0 or step == 1):
        tokens = size * config.model.seq_length
        tell(
            {
                "step": step,
                "loss": found.loss,
                "grad_norm": found.norm,
                **used,
                "tokens_per_second": tokens / took,
                "seconds": took,
                "samples": progress.samples + size,
            }
        )
    return Progress(step, progress.samples + size)


def _evaluate(
    config: TrainingConfig,
    trainee: Trainee,
    data: Any,
    step: int,
    place: torch.device,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Always on the same samples, so that evaluations can be compared."""
    count = config.train.eval_iters * config.train.global_batch_size
    loss = evaluate(trainee, batches_of(data, 0, count, config, data_rank(), place))
    if dist.get_rank() == 0:
        tell({"step": step, "validation_loss": loss})


class _Stop:
    """Whether SIGTERM has come, to any rank."""

    def __init__(self, listen: bool) -> None:
        self._listen, self._came = listen, False

    def __enter__(self) -> Self:
        if self._listen:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listen:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self._came = True

    def is_wanted(self, place: torch.device) -> bool:
        """The same answer on all ranks."""
        if not self._listen:
            return False
        came = torch.tensor([float(self._came)], device=place)
        dist.all_reduce(came, op=dist.ReduceOp.MAX)
        return bool(came.item())
