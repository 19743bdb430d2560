"""Checkpoints of a run: ``torch_dist`` folders that every command takes as they are, and back.

A folder is written under a name of its own and put in place by one rename, before the tracker names it:
a save that fails never harms the last good one. What is no tensor is JSON, so going on from a
checkpoint of somebody else's runs nothing of theirs.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from gptoss_convert.blockio import sync_folder, write_note
from gptoss_convert.errors import CheckpointError, ResourceError
from gptoss_convert.untrusted import read_small
from gptoss_plugins.gpt_model.load import require_whole
from gptoss_plugins.gpt_model.own_pickles import with_own_pickles
from gptoss_plugins.megatron.folder import (
    RUN_STATE,
    TRACKER,
    companion_place,
    folder_of,
    iteration_folder,
)
from gptoss_plugins.megatron.keys import ADAPTER
from gptoss_plugins.megatron.source import TorchDistSource
from gptoss_plugins.train.run.failing import loading, saving
from gptoss_plugins.train.run.optimizer_state import LATER, MAKERS, Later, read_later

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from gptoss_plugins.train.run.trainee import Trainee

_MOST_STATE = 1 << 20  # bytes
_NAME = re.compile(r"iter_\d{7,}")
# As Megatron-LM has it: the optimizer's state under the weights' own names, for any layout to load.
_CONTENT = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        samples: sequences learned from; where in the data the run goes on.

    """

    step: int = 0
    samples: int = 0


class _Planner(MCoreSavePlanner):  # type: ignore[misc]  # megatron-core is untyped
    """Makes what has no data yet when its turn has come."""

    def __init__(self, makers: Mapping[Any, Callable[[], Tensor]]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._makers = makers

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002  # torch's name
        """What to write."""
        if isinstance(object, Tensor) and object.is_meta:
            index = write_item.index
            return self._makers[index.fqn, tuple(index.offset)]().view(object.shape)
        return object


class _PlainSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # megatron-core is untyped
    """megatron-core's own, without the CUDA calls and the helper processes."""

    def __init__(self, makers: Mapping[Any, Callable[[], Tensor]]) -> None:
        super().__init__("torch_dist", 1)
        self._makers = makers

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Write all tensors of this rank."""
        keys, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_tensors(
            mcore_to_pyt_state_dict(keys, False),
            storage_writer=FileSystemWriter(
                checkpoint_dir, thread_count=1, per_thread_copy_ahead=0
            ),
            planner=_Planner(self._makers),
        )


def save(
    root: Path,
    trainee: Trainee,
    progress: Progress,
    files: Mapping[str, bytes],
    beside: Mapping[str, bytes],
    *,
    with_optimizer: bool,
    shared: bool,
    keep: int,
) -> Path:
    """Write a checkpoint. All ranks call this together.

    Args:
        root: folder of all of the run's checkpoints.
        trainee: what to save.
        progress: how far it is.
        files: companions of the model (config.json, tokenizer): name -> bytes.
        beside: files for the checkpoint's own folder: name -> bytes.
        with_optimizer: whether its state is saved.
        shared: data-parallel ranks each write a part of what they all hold.
        keep: how many of the newest checkpoints stay; all if -1.

    """
    target = root / folder_of(progress.step)
    half, old = (root / f".{target.name}.{end}" for end in ("part", "old"))
    if dist.get_rank() == 0:
        for left in (half, old):
            shutil.rmtree(left, ignore_errors=True)
        half.mkdir(parents=True)
    dist.barrier()
    try:
        with saving(half), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            makers: dict[Any, Callable[[], Tensor]] = {}
            dist_checkpointing.save(
                _state(trainee, with_optimizer=with_optimizer, makers=makers),
                str(half),
                sharded_strategy=_strategy(makers, shared=shared),
                content_metadata=_CONTENT,
            )
    except (OSError, ResourceError):
        if dist.get_rank() == 0:
            shutil.rmtree(half, ignore_errors=True)  # the disk may be full of it
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        for name, data in files.items():
            write_note(half / companion_place(name), data)
        for name, data in beside.items():
            write_note(half / name, data)
        kind = trainee.optimizer_kind if with_optimizer else None
        steps = trainee.scheduler.num_steps
        state = {**asdict(progress), "scheduler": steps, "optimizer": kind}
        write_note(half / RUN_STATE, json.dumps(state).encode())
        if target.exists():  # of another run, and whole until this one is
            target.rename(old)
        half.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(root)
        write_note(root / TRACKER, f"{progress.step}\n".encode())
        _remove_old(root, target, keep)
    dist.barrier()
    return target


def _strategy(makers: Mapping[Any, Callable[[], Tensor]], *, shared: bool) -> Any:
    plain = _PlainSave(makers)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(plain, replicas) if shared else plain


def _remove_old(root: Path, newest: Path, keep: int) -> None:
    """Only what runs have saved: a folder of another name, or made by somebody else, is theirs."""
    ours = (p for p in root.glob("iter_*") if _NAME.fullmatch(p.name) and (p / RUN_STATE).is_file())
    found = sorted(p for p in ours if p <= newest)
    for path in found[:-keep] if keep > 0 else ():
        shutil.rmtree(path)


def last_checkpoint(root: Path | None, step: int | None = None) -> Path | None:
    """The checkpoint to go on from; None if there is none yet.

    Raises:
        CheckpointError: what is named is something else.

    """
    if root is None:
        return None
    if step is not None:
        found = root / folder_of(step)
        if not found.is_dir():
            raise CheckpointError(
                f"{found}: is not there; checkpoint.ckpt_step names no checkpoint"
            )
        return found
    if root.exists() and (not root.is_dir() or (root / "config.json").exists()):
        raise CheckpointError(
            f"{root}: is no folder of a run's checkpoints, as checkpoint.load names; weights to start "
            f"from are checkpoint.pretrained_checkpoint"
        )
    return iteration_folder(root) if root.is_dir() else None


def resume(folder: Path, trainee: Trainee, *, with_optimizer: bool) -> Progress:
    """Take everything up again, in whatever layout it was saved. All ranks call this together.

    Raises:
        CheckpointError: it is no checkpoint of a run, or a damaged one.

    """
    try:
        found = json.loads(read_small(folder / RUN_STATE, _MOST_STATE))
        progress = Progress(int(found["step"]), int(found["samples"]))
        steps = int(found["scheduler"])
        if min(progress.step, progress.samples, steps) < 0:
            raise ValueError("a count is below 0")
        kind = found.get("optimizer", trainee.optimizer_kind)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {RUN_STATE}, so no run can go on from it; start from its weights with "
            f"checkpoint.pretrained_checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / RUN_STATE}: is damaged ({error}); use another one"
        ) from None
    if with_optimizer:
        _require_state(folder, kind, trainee)
    later: list[Later] = []
    wanted = _state(trainee, with_optimizer=with_optimizer, later=later)
    _only_tensors(wanted)
    source = TorchDistSource(folder)
    loaded = _load(source, wanted, trainee)
    if with_optimizer:
        state = _merged(wanted["optimizer"], loaded["optimizer"])
        _set_step(state, progress.step)
        with trainee.optimizers():
            trainee.optimizer.load_state_dict(state)
        read_later(source, later)
    else:
        trainee.take_masters()
    trainee.scheduler.step(increment=steps)
    return progress


def _require_state(folder: Path, kind: Any, trainee: Trainee) -> None:
    """Refuse an optimizer's state that this run's cannot take up."""
    own = trainee.optimizer_kind
    alone = "or say checkpoint.load_optim=false to go on with its weights alone"
    if not isinstance(kind, dict):
        raise CheckpointError(
            f"{folder}: holds no state of an optimizer, as checkpoint.save_optim was off; say "
            f"checkpoint.load_optim=false"
        )
    for name, say in (("optimizer", "optimizer.optimizer"), ("precision", "mixed_precision")):
        if kind.get(name, own[name]) != own[name]:
            raise CheckpointError(
                f"{folder}: has the optimizer's state of {kind[name]}, and this run is {own[name]}; "
                f"say {say}={kind[name]}, {alone}"
            )
    if own["distributed"] and not kind.get("distributed", True):
        raise CheckpointError(
            f"{folder}: was saved without the distributed optimizer; say "
            f"optimizer.use_distributed_optimizer=false, {alone}"
        )


def load_adapters(folder: Path, trainee: Trainee) -> None:
    """Take up the adapters of a checkpoint, and nothing else of it. All ranks call this together.

    Raises:
        PlanError: they are not those that are trained here.

    """
    wanted = _state(trainee, with_optimizer=False)
    _load(TorchDistSource(folder), wanted, trainee)
    trainee.take_masters()


def _load(source: TorchDistSource, wanted: dict[str, Any], trainee: Trainee) -> dict[str, Any]:
    """Read what is wanted of a checkpoint, and put weights or adapters where they belong."""
    folder, models = source.iteration, trainee.live.models
    source.check()
    with with_own_pickles(folder) as copy, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shards = (wanted[f"model{number}"].values() for number in range(len(models)))
        require_whole([shard for found in shards for shard in found], copy, folder)
        with loading(folder):
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(copy))
    for number, model in enumerate(models):
        own = loaded[f"model{number}"]
        if trainee.has_adapters:  # the model's own weights are there already
            rest = {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in own}
        else:
            rest = {name: None for name in model.state_dict() if name.endswith("._extra_state")}
        model.load_state_dict(rest | own, strict=True)
    return loaded


def _state(
    trainee: Trainee,
    *,
    with_optimizer: bool,
    makers: dict[Any, Callable[[], Tensor]] | None = None,
    later: list[Later] | None = None,
) -> dict[str, Any]:
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**_CONTENT, "dp_cp_group": replicas, MAKERS: makers, LATER: later}
    state: dict[str, Any] = {
        f"model{number}": model.sharded_state_dict(metadata=metadata)
        for number, model in enumerate(trainee.live.models)
    }
    if trainee.has_adapters:
        for name, shards in state.items():
            state[name] = {key: shard for key, shard in shards.items() if ADAPTER in key}
    if with_optimizer:
        models = state if len(trainee.live.models) > 1 else state["model0"]
        with trainee.optimizers():
            state["optimizer"] = trainee.optimizer.sharded_state_dict(
                models, is_loading=later is not None, metadata=metadata
            )
    return state


def _set_step(state: dict[Any, Any], step: int) -> None:
    """How many steps the moments are of, wherever an optimizer keeps that."""
    one = any(key in state for key in ("optimizer", "param_groups"))
    for part in [state] if one else state.values():
        inner = part.get("optimizer", part)
        if inner.get("state"):
            inner["state"]["common_step"] = torch.tensor(float(step))
        for group in inner["param_groups"] if "param_state" in part else ():
            group["step"] = step


def _merged(own: Any, loaded: Any) -> Any:
    """What was loaded, and of what is no tensor (names and rates of parameter groups) our own: the
    checkpoint's is a pickle, and says the same.
    """
    if isinstance(own, dict) and isinstance(loaded, dict):
        return {
            key: _merged(own.get(key), loaded.get(key)) for key in [*own, *(loaded.keys() - own)]
        }
    if isinstance(own, list) and isinstance(loaded, list) and len(own) == len(loaded):
        return [_merged(*pair) for pair in zip(own, loaded, strict=True)]
    return own if loaded is None else loaded


def _only_tensors(state: dict[str, Any]) -> None:
    """Leave out the extra states: this model has none."""
    for key, value in list(state.items()):
        if isinstance(value, ShardedObject) and "._extra_state" in value.key:
            del state[key]
        elif isinstance(value, dict):
            _only_tensors(value)
