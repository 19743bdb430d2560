"""The file of packs: Parquet, with the columns that Megatron-Bridge's packed data has.

A row is a pack. ``input_ids`` (list of int32) has its samples one behind the other, each with its last
token; ``seq_start_id`` (list of int32) where each begins; ``loss_mask`` (list of int8), as long as
``input_ids``, 1 where the *next* token is learned. In training a sample of n tokens takes n - 1
places: the last token is a label only. What the file was made of stands in its metadata, under ``KEY``.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptoss_convert.blockio import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SCHEMA = "gptoss-convert.pack/1"
KEY = b"gptoss-convert"
COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
GROUP_TOKENS = 1 << 16  # a row group is read as a whole, for any of its rows


class Pack(NamedTuple):
    """A row.

    Attributes:
        ids: int32 ``[n]``.
        mask: int8 ``[n]``, 1 where the next token is learned.
        starts: int32 ``[samples]``, where each begins.

    """

    ids: NDArray[np.int32]
    mask: NDArray[np.int8]
    starts: NDArray[np.int32]


def write_packs(path: Path, packs: Iterable[Pack], facts: Mapping[str, Any]) -> None:
    """A file of packs; it appears whole or not at all.

    Args:
        path: the file.
        packs: its rows.
        facts: of what, and how, it was made.

    """
    import pyarrow as arrow
    from pyarrow import parquet

    note = {KEY: json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)}
    types = (arrow.int32(), arrow.int8(), arrow.int32())
    fields = [arrow.field(n, arrow.list_(t)) for n, t in zip(COLUMNS, types, strict=True)]
    schema = arrow.schema(fields, metadata=note)
    half = path.with_name(path.name + ".part")
    with open(half, "wb") as file:
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _groups(packs):
                columns = [_column(arrow, parts) for parts in zip(*group, strict=True)]
                table = arrow.Table.from_arrays(columns, schema=schema)
                writer.write_table(table, row_group_size=len(group))
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
    sync_folder(path.parent)


def _groups(packs: Iterable[Pack]) -> Iterable[list[Pack]]:
    group: list[Pack] = []
    tokens = 0
    for pack in packs:
        group.append(pack)
        tokens += len(pack.ids)
        if tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _column(arrow: Any, rows: Iterable[NDArray[Any]]) -> Any:
    rows = list(rows)
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return arrow.ListArray.from_arrays(arrow.array(edges), arrow.array(np.concatenate(rows)))
