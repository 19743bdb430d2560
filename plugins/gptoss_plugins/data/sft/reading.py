"""Packs out of a file, in any order; what a stranger wrote is checked as it is read."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.data.sft.packed_file import COLUMNS, KEY, Pack
from gptoss_plugins.data.units import parquet_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_KEPT = 64  # row groups, of half a megabyte


def is_packed(path: Path) -> bool:
    """Whether a Parquet file has packs, and not records."""
    return set(COLUMNS) <= set(parquet_file(path).schema_arrow.names)


class PackedFile:
    """Packs by their number.

    Args:
        path: the file.
        vocabulary: tokens that the tokenizer has.

    Attributes:
        path: the file.
        facts: what it was made of; nothing, if another program made it.

    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.path = path
        self._vocabulary = vocabulary
        self._file: Any = None
        self._groups: OrderedDict[int, list[NDArray[Any]]] = OrderedDict()
        file = parquet_file(path)
        names = file.schema_arrow.names
        if missing := [name for name in COLUMNS if name not in names]:
            raise CheckpointError(
                f"{path}: has no column {missing[0]!r}, only {', '.join(names)}; make it by data pack"
            )
        counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._edges = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.facts = _facts(file.schema_arrow.metadata or {}, path)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, number: int) -> Pack:
        """A pack, checked.

        Raises:
            CheckpointError: it is damaged, or has tokens that the tokenizer lacks.

        """
        group = int(np.searchsorted(self._edges, number, "right")) - 1
        columns = self._group(group)
        row = number - int(self._edges[group])
        cut = []
        for edges, values in zip(columns[::2], columns[1::2], strict=True):
            cut.append(values[edges[row] : edges[row + 1]])
        pack = Pack(*cut)
        if problem := _problem(pack, self._vocabulary):
            raise CheckpointError(f"{self.path}: row {number} {problem}; pack the data again")
        return pack

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None, "_groups": OrderedDict()}

    def _group(self, number: int) -> list[NDArray[Any]]:
        """Edges and values of each column of a row group."""
        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        import pyarrow as arrow

        if self._file is None:
            self._file = parquet_file(self.path)
        found: list[NDArray[Any]] = []
        try:
            table = self._file.read_row_group(number, columns=[*COLUMNS])
            for name in COLUMNS:  # others write int64, or bool for the mask
                column = table.column(name).combine_chunks().cast(arrow.list_(arrow.int32()))
                if column.null_count or column.values.null_count:
                    raise ValueError(f"{name} has nulls")
                found += [column.offsets.to_numpy(), column.values.to_numpy()]
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: its row group {number} cannot be read ({error}); pack the data again"
            ) from None
        self._groups[number] = found
        if len(self._groups) > _KEPT:
            self._groups.popitem(last=False)
        return found


def _facts(metadata: dict[bytes, bytes], path: Path) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(KEY, b"{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its metadata is damaged; pack the data again")
    return found


def _problem(pack: Pack, vocabulary: int) -> str | None:
    ids, mask, starts = pack
    if not len(ids) or len(mask) != len(ids):
        return f"has {len(ids)} input_ids and {len(mask)} of loss_mask"
    if not len(starts) or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] >= len(ids):
        return "has a seq_start_id that does not go up from 0 within input_ids"
    if ids.min() < 0 or ids.max() >= vocabulary:
        worst = ids.max() if ids.min() >= 0 else ids.min()
        return f"has token {worst}, where the tokenizer has {vocabulary}"
    return None
