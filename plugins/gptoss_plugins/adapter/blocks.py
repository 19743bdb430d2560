"""Finding out that the adapter of a fused linear is one for each of its modules, put together."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_plugins.adapter.opening import Adapter
    from gptoss_plugins.adapter.table import Target


def separate_ranks(adapter: Adapter, target: Target) -> Target:
    """The target with the ranks of its modules' own adapters, if that is what it is made of.

    It is if every column of B is not zero in the rows of one module only, on all layers, and the
    modules' columns stand in their order.
    """
    if len(target.line.parts) < 2 or target.line.experts:
        return target
    import torch

    used: Tensor | None = None
    for layer in range(adapter.logical.fields["num_layers"]):
        b = adapter.factor(target, "linear_out", layer)
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
