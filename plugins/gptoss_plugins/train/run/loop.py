"""A whole run: build, load, step after step, evaluate, save, stop."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import Choice
from gptoss_plugins.gpt_model.filling import fill
from gptoss_plugins.gpt_model.world import world_of
from gptoss_plugins.train.architecture import hf_config, megatron_fields
from gptoss_plugins.train.ranks import layout_of
from gptoss_plugins.train.run.collecting import Collecting
from gptoss_plugins.train.run.data import Steps, place_of
from gptoss_plugins.train.run.datasets import datasets_of
from gptoss_plugins.train.run.figures import expert_load, most_memory, utilization
from gptoss_plugins.train.run.run_config import run_config_files
from gptoss_plugins.train.run.saving import Progress, last_checkpoint, load_adapters, resume, save
from gptoss_plugins.train.run.step import evaluate, train_step
from gptoss_plugins.train.run.stopping import Stop
from gptoss_plugins.train.run.trainee import build_trainee, rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gptoss_convert.logical import Logical
    from gptoss_convert.registry import Registry
    from gptoss_plugins.train.config import TrainingConfig
    from gptoss_plugins.train.run.step import Batch, Found
    from gptoss_plugins.train.run.trainee import Trainee


def run(
    config: TrainingConfig,
    registry: Registry,
    *,
    device: str | None,
    tell: Callable[[dict[str, Any]], None],
) -> Progress:
    """Train as a config says. All ranks call this together.

    Args:
        config: the run; it has been checked.
        registry: the plugins.
        device: ``cpu`` or ``cuda``; CUDA where there is one, if None.
        tell: gets a line of figures on rank 0.

    Returns:
        how far it came: all steps, or those before it was told to stop.

    Raises:
        ConvertError: the data, the checkpoint or the layout does not fit.

    """
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it tells what it is made of
    cp, seed = config.model.context_parallel_size, config.rng.seed
    with ExitStack() as stack:
        place = stack.enter_context(
            world_of(layout_of(config.model), device, cp=cp, seed=seed, resumes=True)
        )
        stop = stack.enter_context(Stop(config.train, place))
        train, valid, files = datasets_of(config, registry)
        if config.checkpoint.save and dist.get_rank() == 0:
            _require_writable(Path(config.checkpoint.save))
        trainee, progress = _begin(config, registry, place)
        collecting = stack.enter_context(Collecting(config.train))
        one = _Run(config, trainee, files, tell)
        steps = Steps(train, config, place_of(place), one.fields["vocab_size"])
        held_out = valid and Steps(valid, config, place_of(place), one.fields["vocab_size"])
        one.begin(progress)
        saved, coming = progress, steps.since(progress.samples)
        while progress.step < config.train.train_iters:
            progress = one.step(progress, coming)
            ends = progress.step == config.train.train_iters
            evaluated = config.train.eval_iters > 0 and (
                ends or _is_due(config.train.eval_interval, progress)
            )
            if held_out and evaluated:
                one.evaluate(progress, held_out)
            collecting.after(progress.step, evaluated=evaluated)
            if _is_due(config.checkpoint.save_interval, progress):
                one.save(progress)
                saved = progress
            if stop.is_wanted(progress.step):
                break
        if saved != progress:
            one.save(progress)
        return progress


def _require_writable(folder: Path) -> None:
    """Now, and not at the first save.

    Raises:
        UsageError: nothing can be saved there.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror}); name another folder with "
            f"checkpoint.save"
        ) from None


def _is_due(interval: int, progress: Progress) -> bool:
    return progress.step % interval == 0


def _begin(
    config: TrainingConfig, registry: Registry, place: torch.device
) -> tuple[Trainee, Progress]:
    """The run's own last checkpoint, or the weights to start from, or random ones.

    A run of adapters has only those in its checkpoints, and always starts from a model's weights.
    """
    where, has_adapters = config.checkpoint, config.peft is not None
    last = last_checkpoint(Path(where.load) if where.load else None, where.ckpt_step)
    start = where.pretrained_checkpoint if has_adapters or not last else None
    if last and not has_adapters:
        _require_same_model(open_logical(str(last), registry, Choice()), str(last), config)
    trainee = build_trainee(config, registry, place, random_weights=not (last or start))
    if start or (last and where.finetune):
        _load(start or str(last), config, registry, trainee)
    if last and has_adapters and where.finetune:
        load_adapters(last, trainee)
    if last and not where.finetune:
        return trainee, resume(last, trainee, with_optimizer=where.load_optim)
    return trainee, Progress()


def _load(path: str, config: TrainingConfig, registry: Registry, trainee: Trainee) -> None:
    """The model's weights from a checkpoint of any format."""
    checkpoint = open_logical(path, registry, Choice())
    _require_same_model(checkpoint, path, config)
    fill(trainee.live, checkpoint)
    trainee.take_masters()


def _require_same_model(checkpoint: Logical, path: str, config: TrainingConfig) -> None:
    ours, theirs = megatron_fields(config.model), checkpoint.fields
    differ = sorted(k for k in ours if k in theirs and ours[k] != theirs[k])
    differ = [k for k in differ if not k.startswith("moe_router_load")]
    if differ:
        raise CheckpointError(
            f"{path}: is another model than model.size={config.model.size} "
            f"({', '.join(differ)} differ); name the right size or checkpoint"
        )


class _Run:
    """What a run does again and again."""

    def __init__(
        self,
        config: TrainingConfig,
        trainee: Trainee,
        files: Mapping[str, bytes],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config, self._trainee, self._tell = config, trainee, tell
        own = json.dumps(hf_config(config.model), indent=2).encode()
        self._files = {"config.json": own, **files}
        self._beside = run_config_files(config)
        self.fields = megatron_fields(config.model)

    def begin(self, progress: Progress) -> None:
        """Say where the run starts."""
        where = self._config.checkpoint
        if progress.step:
            source = where.load
        else:
            source = where.pretrained_checkpoint or (where.load if where.finetune else None)
        if dist.get_rank() == 0:
            self._tell({"step": progress.step, "starts_from": source})

    def step(self, progress: Progress, coming: Any) -> Progress:
        """The next one, with its line of figures if one is due."""
        config, step = self._config, progress.step + 1
        started = time.monotonic()
        used = rates(self._trainee)
        batches: Sequence[Batch] = next(coming)
        _seed(config.rng.seed, step)
        try:
            found = train_step(self._trainee, batches)
        except RuntimeError as error:
            if "local grad norm" not in str(error):  # megatron-core's check of each bucket
                raise
            raise UsageError(
                f"step {step}: a gradient is NaN or infinite; lower optimizer.lr, or look at the data"
            ) from error
        seconds = time.monotonic() - started
        if not math.isfinite(found.loss):
            raise UsageError(
                f"step {step}: the loss is {found.loss}; lower optimizer.lr, or look at the data"
            )
        done = Progress(step, progress.samples + config.train.global_batch_size)
        if step % config.logger.log_interval == 0 or step in (1, config.train.train_iters):
            self._report(done, found, used, seconds)
        return done

    def _report(
        self, progress: Progress, found: Found, used: Mapping[str, float], seconds: float
    ) -> None:
        length = self._config.model.seq_length
        rate = self._config.train.global_batch_size * length / seconds
        load = expert_load(self._trainee)  # by all ranks, as what follows
        memory = most_memory(self._trainee.live.place)
        if dist.get_rank() == 0:
            self._tell(
                {
                    "step": progress.step,
                    "loss": found.loss,
                    "grad_norm": found.norm,
                    **used,
                    "tokens_per_second": rate,
                    **utilization(rate, self.fields, length),
                    **load,
                    "peak_bytes": memory,
                    "seconds": seconds,
                    "samples": progress.samples,
                }
            )

    def evaluate(self, progress: Progress, data: Steps) -> None:
        """Always on the same samples, so that evaluations can be compared."""
        steps = list(data.since(0, self._config.train.eval_iters))
        losses = [evaluate(self._trainee, batches) for batches in steps]
        if dist.get_rank() == 0:
            self._tell({"step": progress.step, "validation_loss": sum(losses) / len(losses)})

    def save(self, progress: Progress) -> None:
        """Where the config says so."""
        where = self._config.checkpoint
        if where.save:
            with self._trainee.whole_weights():
                save(
                    Path(where.save),
                    self._trainee,
                    progress,
                    self._files,
                    self._beside,
                    with_optimizer=where.save_optim,
                    shared=where.fully_parallel_save,
                    keep=where.most_recent_k,
                )


def _seed(seed: int, step: int) -> None:
    """A step's random numbers are its own, so a run that was stopped has those of one that was not.

    Ranks differ: what they drop out is of different sequences, or of different parts of the model.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + dist.get_rank())
