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
from gptoss_convert.plan import ConversionPlan, Group, Output
from gptoss_convert.scratch import round_up
from gptoss_convert.types import GroupWriter, TensorSpec
from gptoss_plugins.megatron import folder as names
from gptoss_plugins.megatron import metadata, sidecars
from gptoss_plugins.megatron.beside import Beside
from gptoss_plugins.megatron.items import Item, ItemFile, spans
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

    from gptoss_convert.spoiled import Residue

_METADATA_BYTES_PER_ENTRY = 512  # more than a pickled chunk or object takes


@dataclass(frozen=True)
class _Item:
    """A chunk, its dtype and frame, and where it goes."""

    chunk: Chunk
    frame: Frame
    at: metadata.Stored

    @property
    def item(self) -> Item:
        """The stretch of the file that it is."""
        around, name = self.frame, f"{self.chunk.key}{list(self.chunk.offsets)}"
        return Item(self.at.offset, around.head, around.data_bytes, tail=around.tail, name=name)


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
        self._beside = Beside(self._folder, plan)
        self._state = CarriedState(plan.target.state.folder) if plan.target.state else None
        state = [Group(name, ()) for name in self._state.files] if self._state else []
        self.groups: Sequence[Group] = [*self._beside.groups.values(), *state, *self._data]
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
        entries = sum(2 * len(i) for items in self._items.values() for i in items.values())
        modules = extra_state_modules(self._outputs())
        entries += sum(1 for m, o in modules.items() for _ in self._objects_of(m, o))
        data += self._beside.nbytes + (self._state.nbytes if self._state else 0)
        return data + entries * _METADATA_BYTES_PER_ENTRY + (1 << 18)

    def done(self, group: Group) -> bool:
        """A data file under its final name is whole: it gets that name last."""
        return bool((self._folder / group.name).exists())

    def open(self, group: Group) -> GroupWriter:
        """Start a data file."""
        path = self._folder / group.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._state and group.name in self._state.files:
            return self._state.open(group.name, path)
        if group.name in self._beside.groups:
            return self._beside.open(group)
        specs = {o.name: o.spec for step in group.steps for o in step.outputs}
        items = {name: [i.item for i in found] for name, found in self._items[group.name].items()}
        writer = BlockWriter(path, self._file_bytes(group), spans(items))
        return ItemFile(writer, items, specs)

    def keep(self, residues: Mapping[str, Residue]) -> None:
        """Beside the scales that are kept."""
        self._beside.keep(residues)

    def finish(self) -> None:
        """Small files, then ``.metadata``, then the mark of completeness, then the trackers."""
        folder, plan = self._folder, self._plan
        self._beside.finish()
        common = sidecars.common_state(plan, stacked=self._stacked)
        self._write(names.RUN_CONFIG, sidecars.run_config(plan))
        train_state = self._write(names.TRAIN_STATE, sidecars.train_state())
        self._write(names.COMMON, sidecars.torch_bytes(common))
        if self._state and (progress := self._state.sidecar(names.RUN_STATE)):
            write_file(folder / names.RUN_STATE, progress)
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

    def _objects(self) -> Mapping[str, metadata.Stored]:
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
