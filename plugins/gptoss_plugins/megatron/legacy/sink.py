"""Writing a file per rank: pieces of the model, under the names of the modules that will load them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

from gptoss_convert.blockio import WRITER_BYTES, BlockWriter, write_file
from gptoss_convert.dtypes import itemsize
from gptoss_convert.layout import EXPERT_AXIS, Parameter, Piece, Rank
from gptoss_convert.plan import ConversionPlan, Group, Step
from gptoss_convert.types import GroupWriter, TensorSpec
from gptoss_plugins.megatron import folder as places
from gptoss_plugins.megatron.beside import Beside
from gptoss_plugins.megatron.items import Item, ItemFile, spans
from gptoss_plugins.megatron.legacy.arguments import arguments
from gptoss_plugins.megatron.legacy.grid import pieces_of, ranks_with_files
from gptoss_plugins.megatron.legacy.names import (
    DIALECTS,
    EMBEDDING,
    FILE,
    LOCAL_GROUPED,
    OUTPUT,
    chunk_key,
    extra_states,
    stored_names,
)
from gptoss_plugins.megatron.legacy.rankfile import END, Slot, lay_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.spoiled import Residue
    from gptoss_convert.stages import Chunk

_BYTES_PER_TENSOR = 1024  # more than its records and its part of the pickle take
_BYTES_PER_FILE = 1 << 18  # more than arguments and the rest of the pickle take


class LegacySink:
    """The root folder, with its one iteration; a file is a group."""

    buffer_bytes = WRITER_BYTES

    def __init__(self, folder: Path, plan: ConversionPlan) -> None:
        self._plan, self._root = plan, folder
        self._folder = folder / places.folder_of(plan.target.iteration)
        self._layout = plan.target.layout
        self._dialect = plan.target.dialect or DIALECTS[0]
        self._chunks = self._layout.chunks(plan.megatron_config["num_layers"])
        self._beside = Beside(self._folder, plan)
        ranks = ranks_with_files(self._layout)
        self._files = {f"{name}/{FILE}": rank for name, rank in ranks.items()}
        data = [self._group(name, rank) for name, rank in self._files.items()]
        self.groups: Sequence[Group] = [*self._beside.groups.values(), *data]

    @cached_property
    def _cut(self) -> list[tuple[Step, Parameter, tuple[Piece, ...]]]:
        """Every step with its parameter's pieces."""
        layers, found = self._plan.megatron_config["num_layers"], []
        for step in self._plan.steps:
            name, shape = step.outputs[0].name, step.outputs[0].spec.shape
            parameter = Parameter.of(step.rule, name, shape, step.layer, layers)
            found.append((step, parameter, pieces_of(parameter, self._layout)))
        return found

    def _group(self, name: str, rank: Rank) -> Group:
        steps = tuple(
            step.part(self._output(chunk, canonical), piece.box)
            for chunk, step, canonical, piece in self._parts(rank)
        )
        return Group(name, steps)

    def _parts(self, rank: Rank) -> Iterator[tuple[Chunk, Step, str, Piece]]:
        """What a rank has: chunk, step, canonical name, piece; in the order of the file."""
        for chunk in self._chunks:
            if chunk.pp != rank.pp:
                continue
            for step, parameter, cut in self._cut:
                if chunk.has(parameter):
                    (piece,) = (p for p in cut if p.is_on(rank))
                    yield chunk, step, parameter.name, piece
            if chunk.is_last and self._has_copy:
                step, _, cut = next(found for found in self._cut if found[1].name == EMBEDDING)
                (piece,) = (p for p in cut if p.owner.get("tp", rank.tp) == rank.tp)
                yield chunk, step, OUTPUT, piece

    @property
    def _has_copy(self) -> bool:
        """Whether the last stage has a copy of the embedding, to make logits with."""
        tied = self._plan.megatron_config.get("share_embeddings_and_output_weights")
        return bool(tied) and self._layout.pp > 1

    def _slots(self, rank: Rank) -> dict[str, list[Slot]]:
        """Output -> the tensors that it fills in the rank's file."""
        return {
            self._output(chunk, name): list(self._stored(chunk, step, name, piece))
            for chunk, step, name, piece in self._parts(rank)
        }

    def _output(self, chunk: Chunk, name: str) -> str:
        return f"{chunk_key(self._layout, chunk.number)}.{name}"

    def _stored(self, chunk: Chunk, step: Step, name: str, piece: Piece) -> Iterator[Slot]:
        """A rank's piece as its modules have it: experts together or one by one."""
        key, whole = chunk_key(self._layout, chunk.number), step.outputs[0].spec
        apart = name.endswith(EXPERT_AXIS) and self._dialect != LOCAL_GROUPED
        spec = TensorSpec(piece.shape[1:] if apart else piece.shape, whole.dtype)
        local = None if step.layer is None else step.layer - chunk.first
        experts = piece.shape[0] if apart else 0
        for stored in stored_names(name, local, self._dialect, experts):
            yield Slot(key, stored, spec, 0 if apart else _padding(piece, whole))

    def _items(self, rank: Rank) -> dict[str, list[Item]]:
        slots = self._slots(rank)
        mine = [chunk_key(self._layout, c.number) for c in self._chunks if c.pp == rank.pp]
        names = {
            key: [s.name for found in slots.values() for s in found if s.chunk == key]
            for key in mine
        }
        state = {
            "args": arguments(self._plan, self._dialect),
            "checkpoint_version": 3.0,
            "iteration": self._plan.target.iteration,
        }
        return lay_out(
            slots, state, {key: extra_states(found, self._dialect) for key, found in names.items()}
        )

    @property
    def nbytes(self) -> int:
        """Upper bound; data to the byte."""
        total = self._beside.nbytes + (1 << 16)
        for rank in self._files.values():
            slots = [slot for found in self._slots(rank).values() for slot in found]
            total += sum(slot.spec.nbytes + _BYTES_PER_TENSOR for slot in slots) + _BYTES_PER_FILE
        return total

    def done(self, group: Group) -> bool:
        """A file under its final name is whole: it gets that name last."""
        return bool((self._folder / group.name).exists())

    def open(self, group: Group) -> GroupWriter:
        """Start a file."""
        path = self._folder / group.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if group.name in self._beside.groups:
            return self._beside.open(group)
        items = self._items(self._files[group.name])
        specs = {o.name: o.written for step in group.steps for o in step.outputs}
        return ItemFile(BlockWriter(path, items[END][0].end, spans(items)), items, specs)

    def keep(self, residues: Mapping[str, Residue]) -> None:
        """Beside the scales that are kept."""
        self._beside.keep(residues)

    def finish(self) -> None:
        """Companions; then the tracker, by which a loader finds the iteration."""
        self._beside.finish()
        write_file(self._root / places.TRACKER, str(self._plan.target.iteration).encode())


def _padding(piece: Piece, whole: TensorSpec) -> int:
    """Bytes of a piece's rows past the end of the vocabulary; no one hands those in."""
    if not piece.box:
        return 0
    past = sum(max(0, stop - max(start, whole.shape[0])) for start, stop in piece.box[0])
    row = math.prod(size for size in piece.shape[1:]) * itemsize(whole.dtype)
    return past * row
