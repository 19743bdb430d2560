"""Finding out that an adapter in Megatron's form has a simpler one: what was put together, and padded."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_plugins.adapter.opening import Adapter
    from gptoss_plugins.adapter.table import Target


def simplest(adapter: Adapter, target: Target) -> Target:
    """The target without zeros at the end of its rank, and of a fused linear with the ranks of its
    modules' own adapters, if that is what it is made of.
    """
    rank = _used(adapter, target)
    if rank < target.rank:
        target = replace(target, rank=rank, padded=target.rank)
    is_fused = len(target.line.parts) > 1 and not target.line.experts
    return _separate(adapter, target) if is_fused else target


def _layers(adapter: Adapter) -> range:
    return range(adapter.logical.fields["num_layers"])


def _used(adapter: Adapter, target: Target) -> int:
    """The rank up to which A or B is not zero on some layer; 1 at least."""
    most = 1
    for layer in _layers(adapter):
        a, b = adapter.factors(target, layer)
        both = (a != 0).any(-1) | (b != 0).any(-2)
        found = both.reshape(-1, target.rank).any(0).nonzero()
        most = max(most, int(found.max()) + 1 if len(found) else 0)
        if most == target.rank:
            break
    return most


def _separate(adapter: Adapter, target: Target) -> Target:
    """With ranks, if every column of B is not zero in the rows of one module only, on all layers, and the
    modules' columns stand in their order.
    """
    import torch

    used: Tensor | None = None
    for layer in _layers(adapter):
        b = adapter.factor(target, "linear_out", layer)[:, : target.rank]
        parts = target.line.rule.op.inverse(b)
        here = torch.stack([(part.reshape(-1, target.rank) != 0).any(0) for part in parts])
        used = here if used is None else used | here
    assert used is not None
    if not bool((used.sum(0) == 1).all()):
        return target
    owners = used.int().argmax(0).tolist()
    if any(one > two for one, two in pairwise(owners)):
        return target
    counts = {owner: len(list(columns)) for owner, columns in groupby(owners)}
    return replace(target, ranks=tuple(counts.get(n, 0) for n in range(len(target.line.parts))))
