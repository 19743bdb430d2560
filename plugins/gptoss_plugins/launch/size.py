"""How many nodes, GPUs and processes a command gets: as said, checked; or as few as it needs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError
from gptoss_plugins.train import nearest

if TYPE_CHECKING:
    from gptoss_plugins.launch.inner import Inner

_MOST_GPUS = 8  # of a node, where nobody says how many it has


@dataclass(frozen=True)
class Size:
    """What a job is given.

    Attributes:
        nodes: how many.
        gpus: of each node; 0 for none.
        processes: on each node.

    """

    nodes: int
    gpus: int
    processes: int

    @property
    def world(self) -> int:
        """All processes."""
        return self.nodes * self.processes


def size_here(inner: Inner, processes: int | None) -> Size:
    """Processes of this machine, as many as the layout needs if nobody says.

    Raises:
        UsageError: the command cannot run so.

    """
    count = processes or inner.need
    if inner.kind == "ranks" and count % inner.need:
        raise UsageError(
            f"{counted(count, 'rank')}: the layout ({inner.layout}) takes {inner.need} or a multiple of "
            f"it; say --nproc-per-node {nearest.multiple(count, inner.need)}"
        )
    return size_of(inner, 1, 0, count)


def size_of(inner: Inner, nodes: int | None, gpus: int | None, processes: int | None) -> Size:
    """What is given, the rest as small as the command's layout allows.

    Args:
        inner: the command.
        nodes: of the job; None for as many as it needs.
        gpus: of each node; None for one per rank, and for none where there are no ranks.
        processes: on each node; None for one per GPU.

    Raises:
        UsageError: the command cannot run so.

    """
    if inner.kind == "ranks":
        found = _of_ranks(inner, nodes, gpus, processes)
        _require_layout(inner, found)
        return found
    if inner.kind == "alone" and (nodes or 1) * (processes or 1) > 1:
        raise UsageError(f"{inner.name} is one process; leave --nodes and --nproc-per-node out")
    each = processes or (max(1, gpus or 0) if inner.kind == "shares" else 1)
    return Size(nodes or 1, gpus or 0, each)


def _of_ranks(inner: Inner, nodes: int | None, gpus: int | None, processes: int | None) -> Size:
    if gpus and processes and gpus != processes:
        raise UsageError(
            f"--nproc-per-node {processes} with --gpus-per-node {gpus}: each rank has a GPU of its "
            f"own; leave one of the two out"
        )
    each = processes or gpus or _full_or_fewer(inner.need, nodes or 1, on_gpus=gpus is None)
    return Size(nodes or _nodes_for(inner, each), each if gpus is None else gpus, each)


def _full_or_fewer(need: int, nodes: int, *, on_gpus: bool) -> int:
    """Ranks of a node where nobody says: as few as will do; but of more nodes than that takes, all GPUs."""
    if on_gpus and nodes > math.ceil(need / _MOST_GPUS):
        return _MOST_GPUS
    return min(_MOST_GPUS, need // math.gcd(need, nodes))


def _nodes_for(inner: Inner, each: int) -> int:
    """The fewest nodes of so many ranks that make up the layout."""
    return inner.need // math.gcd(inner.need, each)


def _require_layout(inner: Inner, size: Size) -> None:
    if size.world % inner.need:
        best = nearest.multiple(size.nodes, _nodes_for(inner, size.processes))
        raise UsageError(
            f"{counted(size.nodes, 'node')} of {counted(size.processes, 'rank')} make "
            f"{size.world}, and the layout ({inner.layout}) takes {inner.need} or a multiple of it; "
            f"say --nodes {best}"
        )
    if inner.config is None:
        return
    from gptoss_plugins.train.checks import require_sound
    from gptoss_plugins.train.config import NAMED

    # Whether the formats of Transformer Engine can be had is a matter of the nodes, not of this machine.
    config = dataclasses.replace(inner.config, mixed_precision=NAMED["bf16_mixed"])
    require_sound(config, size.world)


def counted(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'s' * (number != 1)}"
