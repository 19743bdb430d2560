"""The processes of a parallel layout: joined, counted, and each one's place in it."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.api import CheckpointException

from gptoss_convert.errors import ConfigError
from gptoss_plugins.gpt_model.cpu_shim import cuda_means_cpu
from gptoss_plugins.gpt_model.parallel import initialize_parallel, shut_down_parallel
from gptoss_plugins.gpt_model.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from gptoss_convert.layout import Layout, Rank


@contextlib.contextmanager
def world_of(
    layout: Layout,
    device: str | None,
    *,
    schedules: bool = True,
    cp: int = 1,
    seed: int = 1234,
    resumes: bool = False,
) -> Iterator[torch.device]:
    """The ranks, joined in a layout; on CPUs megatron-core's calls for CUDA mean the CPU.

    Where there are several ranks, each notices when another is gone; of their errors, one is told.

    Args:
        layout: of the ranks.
        device: ``cpu`` or ``cuda``; CUDA where there is one, if None.
        schedules: whether megatron-core's pipeline schedules or its optimizer will run.
        cp: context-parallel ranks, which cut no weights and so are not of the layout.
        seed: of random weights.
        resumes: whether the same command, run again, goes on from what was saved.

    Raises:
        ConfigError: there are not as many ranks as the layout needs.
        ConvertError: a rank does not start.

    """
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    peers = Peers(rank, world, resumes=resumes) if world > 1 else None
    is_whole = True
    try:
        if peers:
            peers.meet()
        require_world(layout, world)
        place = initialize_parallel(
            layout.tp,
            layout.pp,
            layout.ep,
            vpp=layout.vpp if layout.vpp > 1 else None,
            cp=cp,
            device=device,
            seed=seed,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of megatron-core and torch, to their own developers
            if place.type == "cpu":
                stack.enter_context(cuda_means_cpu(factories=schedules))
            yield place
    except (Exception, KeyboardInterrupt, CheckpointException) as error:
        if peers:
            is_whole = (
                False  # NCCL would wait for the others before this rank could tell its reason
            )
            peers.failed(error)
        raise
    finally:
        if is_whole:
            shut_down_parallel()
        if peers:
            peers.close()


def coordinates(number: int, world: int, layout: Layout) -> Rank:
    """A rank's place; in a world larger than the layout needs, every stage's ranks are repeated."""
    stage, within = divmod(number, world // layout.pp)
    each = layout.ranks_per_stage
    return list(layout.coordinates())[stage * each + within % each]


def require_world(layout: Layout, world: int) -> None:
    """Raise ConfigError unless the ranks there are make up the layout."""
    if layout.etp > 1:
        raise ConfigError(
            f"--etp {layout.etp}: megatron-core computes no experts with biases under expert tensor "
            f"parallelism; leave --etp out"
        )
    if world % layout.world:
        raise ConfigError(
            f"{layout} needs {layout.world} processes, or a multiple of that, and there are {world}; "
            f"start them with python -m torch.distributed.run --nproc_per_node={layout.world}"
        )
