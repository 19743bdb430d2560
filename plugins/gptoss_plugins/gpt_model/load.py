"""Fill a model from a distributed (torch_dist) checkpoint, strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from gptoss_convert.errors import CheckpointError, PlanError
from gptoss_plugins.gpt_model.own_pickles import with_own_pickles
from gptoss_plugins.megatron.folder import MARK, iteration_folder
from gptoss_plugins.megatron.keys import OPTIMIZER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron.core.models.gpt.gpt_model import GPTModel

# What megatron-core's local layer spec calls `pre_mlp_layernorm.weight`; some checkpoints hold both.
_SECOND_NAME = ".mlp.linear_fc1.layer_norm_weight"

Shapes = dict[str, tuple[int, ...]]


def load_checkpoint(model: GPTModel | Sequence[GPTModel], folder: str | Path) -> None:
    """Read this rank's part of ``folder`` into ``model``, in the parameters' dtype.

    Every parameter must be stored in its full shape, and every stored tensor must be the model's.
    Extra states (FP8 scales of Transformer Engine) are left alone: this model has none. All ranks
    call this together, and all raise if one finds a misfit; nothing is read before that is known.

    Args:
        model: as built by ``build_gpt_model``; all chunks of this rank's, in a virtual pipeline.
        folder: an ``iter_*`` folder, or the root that names its latest one.

    Raises:
        CheckpointError: there is no distributed checkpoint, or it is not one to trust.
        PlanError: its tensors are not the model's; all misfits are listed.

    """
    place = iteration_folder(Path(folder))
    if place is None or not (place / MARK).is_file():
        raise CheckpointError(f"{folder}: no distributed checkpoint here; give its iter_* folder")
    with with_own_pickles(place) as copy:
        _fill(model, copy, place)


def _fill(model: GPTModel | Sequence[GPTModel], copy: Path, place: Path) -> None:
    """Load from ``copy``, which stands for ``place``."""
    chunks = model if isinstance(model, Sequence) else [model]
    wanted = {
        f"model{number}": {
            name: shard
            for name, shard in chunk.sharded_state_dict(metadata=_metadata(copy)).items()
            if not isinstance(shard, ShardedObject)
        }
        for number, chunk in enumerate(chunks)
    }
    require_whole([shard for shards in wanted.values() for shard in shards.values()], copy, place)
    loaded = dist_checkpointing.load(wanted, str(copy))
    for number, chunk in enumerate(chunks):
        extra = {name: None for name in chunk.state_dict() if name.endswith("._extra_state")}
        chunk.load_state_dict(extra | loaded[f"model{number}"], strict=True)


def _metadata(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its own layout, and the group that holds replicas."""
    stored = dist_checkpointing.load_content_metadata(str(folder)) or {}
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**stored, "dp_cp_group": replicas}


def require_whole(wanted: Sequence[Any], copy: Path, place: Path) -> None:
    """Raise, on every rank alike, unless the checkpoint holds what is wanted, and no other weights.

    Args:
        wanted: megatron-core's descriptions of shards.
        copy: the checkpoint.
        place: how it is called, for messages.

    Raises:
        PlanError: listing every misfit.

    """
    metadata = dist_checkpointing.load_tensors_metadata(str(copy))
    stored = {key: tuple(shard.global_shape) for key, shard in metadata.items()}
    mine = _whole_shapes(wanted)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ([*mine], [*_misfits(mine, stored)]))
    problems = {problem for _, found in everyone for problem in found}
    problems.update(_strangers(stored, {key for keys, _ in everyone for key in keys}))
    if problems:
        raise PlanError(str(place), problems)


def _whole_shapes(wanted: Sequence[Any]) -> Shapes:
    """Checkpoint key -> shape of the whole tensor; () where padding may differ (vocabulary)."""
    shapes: Shapes = {}
    for shard in wanted:
        for part in shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]:
            shapes[part.key] = () if part.allow_shape_mismatch else tuple(part.global_shape)
    return shapes


def _misfits(mine: Shapes, stored: Shapes) -> Iterator[str]:
    for key, shape in mine.items():
        if key not in stored:
            yield f"{key}: not in the checkpoint; convert the model again"
        elif shape and stored[key] != shape:
            yield f"{key}: is {stored[key]}, the model's is {shape}; build it from the same config"


def _strangers(stored: Shapes, known: set[str]) -> Iterator[str]:
    for key in stored:
        if key not in known and not key.endswith(_SECOND_NAME) and not key.startswith(OPTIMIZER):
            yield f"{key}: the model has no such tensor; build it from the same config"
