"""Writing a ``torch_dist`` checkpoint with no model, no process group and no megatron-core.

One file per group of steps (what stands before the layers, each layer, what stands after). The
place of every chunk is known before the first byte, so ``.metadata`` does not depend on who wrote
what, when, or in how many attempts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.blockio import WRITER_BYTES, BlockWriter, write_file
from gptoss_convert.filecopy import FileCopy
from gptoss_convert.ops import split_row_major
from gptoss_convert.plan import ConversionPlan, Group, Output
from gptoss_convert.scratch import round_up
from gptoss_convert.types import GroupWriter, TensorSpec
from gptoss_plugins.huggingface.sink import open_shard, shard_header
from gptoss_plugins.megatron import folder as names
from gptoss_plugins.megatron import metadata, sidecars
from gptoss_plugins.megatron.keys import (
    PER_LAYER,
    Chunk,
    chunks,
    extra_state_modules,
    extra_state_objects,
    global_shape,
    place,
)
from gptoss_plugins.megatron.state import CarriedState
from gptoss_plugins.megatron.torchzip import ALIGNMENT, Frame, frame

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

_METADATA_BYTES_PER_ENTRY = 512  # more than a pickled chunk or object takes


@dataclass(frozen=True)
class _Item:
    """A chunk, its dtype and frame, and where it goes."""

    chunk: Chunk
    frame: Frame
    at: metadata.Stored


class TorchDistSink:
    """The root folder, with its one iteration."""

    buffer_bytes = WRITER_BYTES

    def __init__(self, folder: Path, plan: ConversionPlan) -> None:
        self._plan = plan
        self._root = folder
        self._folder = folder / names.folder_of(plan.target.iteration)
        self._stacked = plan.target.dialect != PER_LAYER
        self._layers = plan.megatron_config["num_layers"]
        runs = itertools.groupby(plan.steps, key=lambda step: step.layer)
        self._data = [
            Group(f"__{number}_0.distcp", tuple(steps)) for number, (_, steps) in enumerate(runs)
        ]
        self._kept = {name: Group(name, plan.kept) for name in _kept_files(plan)}
        self._copied = {name: Group(name, ()) for name in plan.target.attachments}
        self._state = CarriedState(plan.target.state.folder) if plan.target.state else None
        state = [Group(name, ()) for name in self._state.files] if self._state else []
        self.groups: Sequence[Group] = [
            *self._kept.values(), *self._copied.values(), *state, *self._data
        ]  # fmt: skip
        self._items = {group.name: dict(self._place(group)) for group in self._data}

    def _place(self, group: Group) -> Iterator[tuple[str, list[_Item]]]:
        """Output name -> its items, one behind the other from the file's start."""
        position = 0
        for step in group.steps:
            for output in step.outputs:
                items = []
                for chunk in chunks(output, step.rule.shard, stacked=self._stacked):
                    around = frame(TensorSpec(chunk.sizes, output.spec.dtype))
                    at = metadata.Stored(group.name, position, around.nbytes)
                    items.append(_Item(chunk, around, at))
                    position = round_up(position + around.nbytes, ALIGNMENT)
                yield output.name, items

    def _file_bytes(self, group: Group) -> int:
        last = max(
            (i.at for items in self._items[group.name].values() for i in items),
            key=lambda at: at.offset,
        )
        return last.offset + last.length

    @property
    def nbytes(self) -> int:
        """Data files to the byte; an upper bound of the rest."""
        data = sum(map(self._file_bytes, self._data))
        data += sum(len(shard_header(group)) + group.nbytes for group in self._kept.values())
        entries = sum(2 * len(i) for items in self._items.values() for i in items.values())
        modules = extra_state_modules(self._outputs())
        entries += sum(1 for m, o in modules.items() for _ in self._objects_of(m, o))
        copied = (*self._plan.files.values(), *self._plan.target.attachments.values())
        companions = sum(path.stat().st_size for path in copied)
        data += self._state.nbytes if self._state else 0
        return data + entries * _METADATA_BYTES_PER_ENTRY + companions + (1 << 18)

    def done(self, group: Group) -> bool:
        """A data file under its final name is whole: it gets that name last."""
        return bool((self._folder / group.name).exists())

    def open(self, group: Group) -> GroupWriter:
        """Start a data file."""
        path = self._folder / group.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._state and group.name in self._state.files:
            return self._state.open(group.name, path)
        if group.name in self._copied:
            return FileCopy(self._plan.target.attachments[group.name], path)
        if group.name in self._kept:
            return open_shard(path, group, shard_header(group))
        writer = BlockWriter(path, self._file_bytes(group))
        specs = {o.name: o.spec for step in group.steps for o in step.outputs}
        return GroupFile(writer, self._items[group.name], specs)

    def finish(self) -> None:
        """Small files, then ``.metadata``, then the mark of completeness, then the trackers."""
        folder, plan = self._folder, self._plan
        for name, path in plan.files.items():
            write_file(folder / names.companion_place(name), path.read_bytes())
        common = sidecars.common_state(plan, stacked=self._stacked)
        self._write(names.RUN_CONFIG, sidecars.run_config(plan))
        train_state = self._write(names.TRAIN_STATE, sidecars.train_state())
        self._write(names.COMMON, sidecars.torch_bytes(common))
        write_file(folder / names.METADATA, metadata.dump(self._contents()))
        write_file(folder / names.MARK, sidecars.metadata_json())
        if train_state:
            write_file(self._root / names.LATEST_TRAIN_STATE, train_state)
        write_file(self._root / names.TRACKER, str(plan.target.iteration).encode())

    def _write(self, name: str, data: bytes) -> bytes | None:
        """A small file; the trainer's own, or none, where its state is carried."""
        kept = self._state.sidecar(name) if self._state else data
        if kept is not None:
            write_file(self._folder / name, kept)
        return kept

    def _outputs(self) -> list[Output]:
        return [output for step in self._plan.steps for output in step.outputs]

    def _contents(self) -> metadata.Contents:
        state = self._state.contents if self._state else metadata.Contents({}, {})
        return metadata.Contents(
            {**self._tensors(), **state.tensors}, {**self._objects(), **state.objects}
        )

    def _tensors(self) -> dict[str, metadata.Tensor]:
        """Keys in order of first appearance; further names of a tensor share its bytes."""
        specs: dict[str, TensorSpec] = {}
        boxes: dict[str, list[metadata.StoredChunk]] = {}
        for group in self._data:
            for output in (o for step in group.steps for o in step.outputs):
                items = self._items[group.name][output.name]
                for name in (output.name, *output.also):
                    key = place(name, stacked=self._stacked).key
                    shape = global_shape(output, self._layers, stacked=self._stacked)
                    specs[key] = TensorSpec(shape, output.spec.dtype)
                    boxes.setdefault(key, []).extend(
                        metadata.StoredChunk(i.chunk.offsets, i.chunk.sizes, i.at) for i in items
                    )
        return {key: metadata.Tensor(spec, tuple(boxes[key])) for key, spec in specs.items()}

    def _objects(self) -> dict[str, metadata.Stored]:
        """Every ``_extra_state`` is the same empty object, so all share one copy of its bytes."""
        data = sidecars.torch_bytes([None])
        write_file(self._folder / "__extra_state.distcp", data)
        at = metadata.Stored("__extra_state.distcp", 0, len(data))
        modules = extra_state_modules(self._outputs())
        return {
            name: at
            for module, output in modules.items()
            for name in self._objects_of(module, output)
        }

    def _objects_of(self, module: str, output: Output) -> Iterator[str]:
        return extra_state_objects(module, output, self._layers, stacked=self._stacked)


def _kept_files(plan: ConversionPlan) -> list[str]:
    """The file for what is kept of the source's codec, if anything is."""
    return [f"{names.QUANTIZATION}/{codec}.safetensors" for codec in plan.codecs if plan.kept]


class GroupFile:
    """One data file: the items of a group's outputs, in order."""

    def __init__(
        self,
        writer: BlockWriter,
        items: Mapping[str, list[_Item]],
        specs: Mapping[str, TensorSpec],
    ) -> None:
        self._writer = writer
        self._row_bytes = {n: s.nbytes // s.shape[0] if s.shape else 0 for n, s in specs.items()}
        self._taken = dict.fromkeys(items, 0)  # bytes of each output so far
        self._left = {name: list(found) for name, found in items.items()}
        self._missing = 0  # bytes of data the item under way still needs

    def write(self, name: str, rows: slice, tensor: Tensor) -> None:
        """Take the next rows of an output."""
        if rows.start * self._row_bytes[name] != self._taken[name]:
            raise RuntimeError(f"{name} came from row {rows.start} on, out of order")
        self._taken[name] += tensor.numel() * tensor.element_size()
        self._spread(self._left[name], tensor)

    def _spread(self, left: list[_Item], tensor: Tensor) -> None:
        """Spread a piece over the items it covers, or continue the item it is part of."""
        nbytes = tensor.numel() * tensor.element_size()
        room = self._missing or left[0].frame.data_bytes
        if nbytes <= room:
            self._append_part(left, tensor, nbytes)
        elif nbytes % room == 0:
            for part in split_row_major(tensor, nbytes // room):
                self._append_part(left, part, room)
        else:  # a piece across the end of an item that was cut for its size
            count = room // (nbytes // tensor.shape[0])
            self._spread(left, tensor[:count])
            self._spread(left, tensor[count:])

    def _append_part(self, left: list[_Item], part: Tensor, nbytes: int) -> None:
        item = left[0]
        if not self._missing:
            self._writer.append_bytes(bytes(-self._writer.position % ALIGNMENT))
            self._writer.require(item.at.offset, item.chunk.key)
            self._writer.append_bytes(item.frame.head)
            self._missing = item.frame.data_bytes
        self._writer.append(part)
        self._missing -= nbytes
        if not self._missing:
            self._writer.append_bytes(item.frame.tail)
            left.pop(0)

    def close(self) -> None:
        """Put the file in place."""
        if self._missing or any(self._left.values()):
            self.abort()
            raise RuntimeError("a data file was closed before all of it was written")
        self._writer.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._writer.abort()
