"""What a distributed optimizer keeps, for checkpoints: each rank's own part, neither gathered nor copied.

megatron-core gathers the whole state in float32 on the CPU of every data-parallel rank before it writes,
and asks for as much when it reads: 31 bytes per parameter were seen, 330 GB for half of 20B. A rank's
part of a parameter is a run of its elements, though, and a run can be cut into boxes, which are what a
``torch_dist`` checkpoint is made of. So each rank writes the boxes that it holds, one after the other,
and moments are read to where they belong. Master weights that are kept in two halves are in no place
that megatron-core could read to: they are read behind it, piece by piece. Names and shapes of tensors
are megatron-core's own.
"""

from __future__ import annotations

import math
from collections import ChainMap
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from gptoss_convert.errors import CheckpointError
from gptoss_convert.scratch import Scratch
from gptoss_plugins.megatron.source import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from torch import Tensor

    from gptoss_plugins.megatron.source import TorchDistSource
    from gptoss_plugins.train.run.adam import Adam

MAKERS = "gptoss_makers"  # in the metadata: (key, offset) -> makes what is to be written there
LATER = "gptoss_later"  # likewise: what is to be read by read_later
_PIECE = 32 << 20  # bytes of master weights that are read at a time
_STORED = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "master_param": "param",
}  # ours: theirs


class Later(NamedTuple):
    """A box of a master weight in two halves, which is not read with the rest.

    Attributes:
        box: how the checkpoint holds it.
        optimizer: whose it is.
        param: the optimizer's own.
        first: where in the param's elements the box begins.

    """

    box: ShardedTensor
    optimizer: Adam
    param: Tensor
    first: int


class _Part(NamedTuple):
    """What this rank has of a parameter.

    Attributes:
        number: of the parameter, the same on all ranks.
        param: the optimizer's own: a run of elements ``[stop - start]``.
        start: where the run begins in the model's parameter.
        whole: how the checkpoint holds the model's parameter.
        shape: of the model's parameter.

    """

    number: int
    param: Tensor
    start: int
    whole: Any
    shape: torch.Size


def sharded_param_state_fully_reshardable(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """In place of the method of ``DistributedOptimizer``.

    Args:
        self: it, with an optimizer of :class:`Adam` inside.
        model_sharded_state_dict: of the model's own parameters.
        is_loading: whether the tensors are to be read into; to be written otherwise.
        metadata: gets under :data:`MAKERS` how to make what is written, and under :data:`LATER` what
            ``read_later`` is to read.

    Returns:
        By the number of the parameter and the name of the state, its boxes in the order of elements.
        They have no data yet if they are to be written.

    """
    found: dict[int, dict[str, list[ShardedTensor]]] = {}
    for part in _parts(self, model_sharded_state_dict):
        states = found[part.number] = {}
        for name, stored in _STORED.items():
            target = _in_place(self.optimizer, part.param, name) if is_loading else None
            states[stored] = []
            for box, first in _boxes_of(part, f"optimizer.state.{stored}.", name, self.optimizer):
                run = slice(first, first + box.data.numel())
                if not is_loading:
                    made = _maker(self.optimizer, part.param, name, run)
                    metadata[MAKERS][box.key, tuple(box.global_offset)] = made
                elif target is None:
                    metadata[LATER].append(Later(box, self.optimizer, part.param, first))
                    continue
                else:
                    box.data = target[run].view(box.data.shape)
                states[stored].append(box)
    return found


def load_parameter_state_from_fully_reshardable(
    self: Any, state_dict: Mapping[int, Mapping[str, list[Tensor]]]
) -> None:
    """In place of the method of ``DistributedOptimizer``: take what was read.

    Args:
        self: it.
        state_dict: as above, with what was read in place of boxes.

    """
    for number, param in _own(self):
        for name, stored in _STORED.items():
            target = _in_place(self.optimizer, param, name)
            if target is None:
                continue
            at = 0
            for box in state_dict[number][stored]:
                run = target[at : at + box.numel()]
                if run.data_ptr() != box.data_ptr():
                    run.copy_(box.reshape(-1))
                at += box.numel()


def read_later(source: TorchDistSource, later: Iterable[Later]) -> None:
    """Read master weights, piece by piece.

    Args:
        source: the checkpoint.
        later: what is here of each.

    Raises:
        CheckpointError: they are not there, or are another model's.

    """
    scratch = Scratch()
    for box, optimizer, param, first in later:
        found = source.contents.tensors.get(box.key)
        if found is None or found.spec.shape != tuple(box.global_shape):
            holds = "none" if found is None else f"one of shape {list(found.spec.shape)}"
            raise CheckpointError(
                f"{source.iteration}: {box.key} is due with shape {list(box.global_shape)}, and it holds {holds}; "
                f"use another checkpoint, or say checkpoint.load_optim=false"
            )
        at = first
        for part in runs((tuple(box.global_offset), tuple(box.local_shape)), 4, _PIECE):
            scratch.reset()
            value = source.read_box(box.key, part, scratch).reshape(-1)
            optimizer.set_master(param, slice(at, at + value.numel()), value)
            at += value.numel()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Cut a run of elements of a tensor into boxes, none of which has a gap in memory.

    Args:
        shape: of the tensor, contiguous.
        start: first element of the run.
        stop: the one after the last.

    Yields:
        offset and size of each, in the order of the elements.

    """
    if start >= stop:
        return
    if stop - start == math.prod(shape):
        yield (0,) * len(shape), tuple(shape)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # rows that are whole
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *(0,) * len(shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * inner, stop)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    before = row * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *size)


def _own(optimizer: Any) -> Iterator[tuple[int, Any]]:
    """Number and parameter, the optimizer's own, of those that this rank has a part of."""
    for number, param, _ in _ranges(optimizer):
        group, order = optimizer.model_param_group_index_map[param]
        yield number, optimizer.optimizer.param_groups[group]["params"][order]


def _ranges(optimizer: Any) -> Iterator[tuple[int, Any, Any]]:
    """Number, parameter of the model, and which elements of it are this rank's."""
    number = 0
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()
        here = ChainMap(*(bucket["param_map"] for bucket in buckets))
        for param in buffer.param_index_map:  # in this order on all ranks
            if param in here:
                yield number, param, here[param]["param"]
            number += 1


def _parts(optimizer: Any, model_state: Any) -> Iterator[_Part]:
    stored, _ = extract_sharded_tensors_and_factories(model_state)
    of_param = {whole.data: whole for whole in nested_values(stored)}
    own = dict(_own(optimizer))
    for number, param, run in _ranges(optimizer):
        yield _Part(number, own[number], run.start, of_param[param], param.shape)


def _boxes_of(
    part: _Part, prefix: str, name: str, optimizer: Adam
) -> Iterator[tuple[ShardedTensor, int]]:
    """Boxes of a state, without data, and where in this rank's run each begins."""
    dtype = optimizer.stored_dtype(name)
    nothing = torch.empty(part.shape, dtype=dtype, device="meta")
    stop = part.start + part.param.numel()
    for chunk in _chunks(part.whole, prefix, nothing):
        first = int(chunk.data.storage_offset())
        low = max(part.start, first)
        high = min(stop, first + chunk.data.numel())
        at = low - part.start
        for offset, size in boxes(tuple(chunk.data.shape), low - first, high - first):
            yield _box(chunk, offset, size), at
            at += math.prod(size)


def _chunks(whole: Any, prefix: str, data: Tensor) -> list[ShardedTensor]:
    """How the checkpoint cuts a tensor; each chunk is a part of it without gaps."""
    key = prefix + whole.key
    if isinstance(whole, ShardedTensorFactory):
        found = list(nested_values(replace(whole, key=key, data=data).build()))
    else:
        found = [replace(whole, key=key, data=data, dtype=data.dtype)]
    assert all(chunk.data.is_contiguous() for chunk in found)
    return found


def _box(chunk: ShardedTensor, offset: tuple[int, ...], size: tuple[int, ...]) -> ShardedTensor:
    """A box of a chunk. No other data-parallel rank has it: it is the first replica."""
    more = chunk.prepend_axis_num
    before, here = chunk.global_offset[:more], chunk.global_offset[more:]
    shape = (*(1,) * more, *size)
    return replace(
        chunk,
        data=torch.empty(shape, dtype=chunk.dtype, device="meta"),
        local_shape=shape,
        global_offset=(*before, *(a + b for a, b in zip(here, offset, strict=True))),
        axis_fragmentations=None,
        replica_id=(*chunk.replica_id[:-1], 0),
        prepend_axis_num=0,
    )


def _maker(optimizer: Adam, param: Tensor, name: str, run: slice) -> Callable[[], Tensor]:
    return lambda: optimizer.stored_state(param, name, run)


def _in_place(optimizer: Adam, param: Tensor, name: str) -> Tensor | None:
    """What to read a state into: itself, where the checkpoint has it as it is here."""
    if name == "master_param" and param.dtype == torch.bfloat16:
        return None  # it is in two halves
    found: Tensor = optimizer.state[param][name]
    return found.detach()
