"""Tensor, pipeline, expert and expert-tensor parallelism, as megatron-core cuts parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Resharder, Shard, hookimpl
from gptoss_convert.layout import EVERYWHERE, Share
from gptoss_convert.stages import must_divide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptoss_convert.layout import Layout, Parameter, Ranges


def tensor_parallel(parameter: Parameter, layout: Layout) -> Sequence[Share]:
    """Everything but experts: by rows, by inputs, or each half of ``[gate; up]`` by rows."""
    return EVERYWHERE if parameter.has_experts else _cut(parameter, layout, "--tp", layout.tp, 0)


def expert_tensor_parallel(parameter: Parameter, layout: Layout) -> Sequence[Share]:
    """Experts in the same way, below their expert axis."""
    return _cut(parameter, layout, "--etp", layout.etp, 1) if parameter.has_experts else EVERYWHERE


def expert_parallel(parameter: Parameter, layout: Layout) -> Sequence[Share]:
    """Consecutive experts to each rank."""
    if not parameter.has_experts or layout.ep == 1:
        return EVERYWHERE
    must_divide(f"--ep {layout.ep}", layout.ep, parameter.shape[0], "experts")
    return [
        Share(rank, {0: _slice(rank, layout.ep, parameter.shape[0])}) for rank in range(layout.ep)
    ]


def pipeline_parallel(parameter: Parameter, layout: Layout) -> Sequence[Share]:
    """Whole layers; what comes before and after them to the first and the last stage."""
    chunks = layout.chunks(parameter.layers)
    return [Share(c.pp) for c in chunks if c.has(parameter)] if layout.pp > 1 else EVERYWHERE


def _cut(
    parameter: Parameter, layout: Layout, flag: str, count: int, first: int
) -> Sequence[Share]:
    """Equal parts along the rows (dim ``first``) or the inputs (the dim after)."""
    shape, shard, what = parameter.shape, parameter.shard, f"{flag} {count}"
    if parameter.padded:
        rows = layout.padded(shape[0])
        return [
            Share(rank if count > 1 else None, {0: _slice(rank, count, rows)})
            for rank in range(count)
        ]
    if count == 1 or shard is Shard.REPLICATED:
        return EVERYWHERE
    if shard is Shard.GATED:
        half = shape[first] // 2
        must_divide(what, count, half, f"rows of gate and of up in {parameter.name}")
        return [
            Share(rank, {first: _both(_slice(rank, count, half), half)}) for rank in range(count)
        ]
    dim = first + (shard is Shard.ROW)
    if first == 0 and shard is Shard.COLUMN:
        must_divide(what, count, parameter.grain, _blocks(parameter))
    must_divide(
        what, count, shape[dim], f"{'inputs' if dim > first else 'rows'} of {parameter.name}"
    )
    return [Share(rank, {dim: _slice(rank, count, shape[dim])}) for rank in range(count)]


def _both(ranges: Ranges, half: int) -> Ranges:
    """The same rows of gate and of up."""
    return (*ranges, *((start + half, stop + half) for start, stop in ranges))


def _blocks(parameter: Parameter) -> str:
    """What the blocks of rows are that must stay whole."""
    groups = parameter.grain < parameter.shape[0]
    return "key-value groups" if groups and "qkv" in parameter.name else f"rows of {parameter.name}"


def _slice(rank: int, count: int, size: int) -> Ranges:
    each = size // count
    return ((rank * each, (rank + 1) * each),)


@hookimpl
def gptoss_convert_resharders() -> Iterator[Resharder]:
    """One per axis of a layout."""
    yield Resharder("tp", tensor_parallel)
    yield Resharder("pp", pipeline_parallel)
    yield Resharder("ep", expert_parallel)
    yield Resharder("etp", expert_tensor_parallel)
