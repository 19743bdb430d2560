"""First-fit decreasing, and the file of packs: what goes in comes out, and strangers' files are checked."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.data.sft import packed_file, packing
from gptoss_plugins.data.sft.dataset import SftRows, row_of
from gptoss_plugins.data.sft.packed_file import Pack, write_packs
from gptoss_plugins.data.sft.packing import first_fit_decreasing
from gptoss_plugins.data.sft.reading import PackedFile

arrow = pytest.importorskip("pyarrow")
from pyarrow import parquet

CASES = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), min_size=1, max_size=80), st.just(capacity)
    )
)


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition: each sample into the first pack that it fits."""
    packs: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        for pack in packs:
            if sum(lengths[n] for n in pack) + lengths[number] <= capacity:
                pack.append(number)
                break
        else:
            packs.append([number])
    return packs


@given(CASES)
def test_first_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK", 3)
        order, edges = first_fit_decreasing(np.array(lengths, np.int64), capacity)
    packs = [order[a:b].tolist() for a, b in pairwise(edges)]
    assert packs == one_by_one(lengths, capacity)
    assert sorted(order.tolist()) == [*range(len(lengths))]
    assert max(sum(lengths[n] for n in pack) for pack in packs) <= capacity
    # No two packs could be one: any two hold more than one can, so all hold more than half of all.
    assert sum(lengths) <= capacity * len(packs) <= max(capacity, 2 * sum(lengths))


def test_what_first_fit_decreasing_is_known_for() -> None:
    """Packs that come out full, and the classic case in which they do not."""
    full = np.repeat(np.array([70, 50, 40, 30, 20, 10, 60, 20], np.int64), 37)
    order, edges = first_fit_decreasing(full, 100)
    assert len(edges) - 1 == 37 * 3
    # Six of each: 9 packs would do (Johnson 1973: 51 + 26 + 23 and 27 + 26 + 2 * 23...), 11 are made.
    bad = np.array([51] * 6 + [27] * 6 + [26] * 6 + [23] * 12, np.int64)
    order, edges = first_fit_decreasing(bad, 101)
    assert sorted(order.tolist()) == [*range(30)]
    best = -(-int(bad.sum()) // 101)
    assert best <= len(edges) - 1 <= 11 / 9 * 9 + 6 / 9


def _packs() -> list[Pack]:
    """Three packs; every token is another one."""
    rows = []
    for first, sizes in [(10, [4, 2, 3]), (30, [7]), (50, [2, 5])]:
        ids = np.arange(first, first + sum(sizes), dtype=np.int32)
        starts = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
        mask = np.ones(len(ids), np.int8)
        mask[0] = 0
        mask[starts + np.array(sizes) - 1] = 0
        rows.append(Pack(ids, mask, starts))
    return rows


def test_a_row() -> None:
    """By hand: samples 10..13, 14..15 and 16..18 in a row of 8."""
    row = row_of(_packs()[0], 8, 99)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [10, 11, 12, 14, 16, 17, 99, 99],
        "labels": [11, 12, 13, 15, 17, 18, 99, 99],
        "loss_mask": [0, 1, 1, 1, 1, 1, 0, 0],
        "positions": [0, 1, 2, 0, 0, 1, 0, 1],
        "starts": [0, 0, 0, 3, 4, 4, 6, 6],
    }
    assert {str(values.dtype) for name, values in row.items() if name != "loss_mask"} == {
        "torch.int64"
    }
    assert str(row["loss_mask"].dtype) == "torch.float32"
    full = row_of(_packs()[0], 6, 99)  # no padding
    assert full["starts"].tolist() == [0, 0, 0, 3, 4, 4]


def as_megatron_bridge_reads(path: Path, row: int) -> dict[str, list[int]]:
    """What its packed data set makes of a row (GPTSFTPackedDataset.collate_fn), in our words."""
    found = parquet.read_table(path).slice(row, 1).to_pylist()[0]
    edges = [*found["seq_start_id"], len(found["input_ids"])]
    tokens, labels, mask, positions = [], [], [], []
    for start, end in pairwise(edges):
        tokens += found["input_ids"][start : end - 1]
        labels += found["input_ids"][start + 1 : end]
        mask += found["loss_mask"][start : end - 1]
        positions += range(end - 1 - start)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "positions": positions}


def test_the_file_is_megatron_bridges(tmp_path: Path) -> None:
    path = tmp_path / "packs.parquet"
    write_packs(path, _packs(), {"sequence_length": 8})
    schema = parquet.read_schema(path)
    assert [(field.name, str(field.type.value_type)) for field in schema] == [
        ("input_ids", "int32"),
        ("loss_mask", "int8"),
        ("seq_start_id", "int32"),
    ]
    assert json.loads(schema.metadata[b"gptoss-convert"]) == {
        "schema": "gptoss-convert.pack/1",
        "sequence_length": 8,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["packs.parquet"]
    file = PackedFile(path, 57)
    for number in range(3):
        theirs = as_megatron_bridge_reads(path, number)
        ours = row_of(file[number], 8, 99)
        assert {name: ours[name].tolist()[: len(theirs["tokens"])] for name in theirs} == theirs


def test_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "GROUP_TOKENS", 15)
    path = tmp_path / "packs.parquet"
    rows = _packs() * 30
    write_packs(path, rows, {})
    whole = parquet.ParquetFile(path)
    groups = [whole.read_row_group(n)["input_ids"].to_pylist() for n in range(whole.num_row_groups)]
    for group in groups[:-1]:  # no longer than it takes to have 15 tokens
        assert sum(map(len, group[:-1])) < 15 <= sum(map(len, group))
    file = PackedFile(path, 57)
    assert len(file) == 90
    for number in np.random.default_rng(3).permutation(90).tolist():
        for ours, expected in zip(file[number], rows[number], strict=True):
            assert ours.tolist() == expected.tolist()


def test_order_of_epochs(tmp_path: Path) -> None:
    path = tmp_path / "packs.parquet"
    sizes = [*range(2, 13)]
    rows = [Pack(np.arange(n, dtype=np.int32), np.ones(n, np.int8), np.int32([0])) for n in sizes]
    write_packs(path, rows, {})

    def lengths(seed: int, numbers: range, chosen: Any = range(11)) -> list[int]:
        dataset = SftRows(PackedFile(path, 57), np.array(chosen), 12, 99, seed)
        return [int((dataset[number]["tokens"] != 99).sum()) + 1 for number in numbers]

    first, second = lengths(5, range(11)), lengths(5, range(11, 22))
    assert sorted(first) == sorted(second) == sizes
    assert first != second
    assert lengths(5, range(7, 15)) == [*first, *second][7:15]  # as when a run goes on at 7
    assert lengths(6, range(11)) != first
    assert sorted(lengths(5, range(4), [1, 3, 4, 10])) == [3, 5, 6, 12]
    # Those that 2.x of numpy gave: a run that goes on with another one goes on with these.
    assert first == [7, 12, 5, 2, 6, 3, 9, 4, 8, 11, 10]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1, 2]], "loss_mask": [[1, 0]]}, "has no column 'seq_start_id', only"),
        ({"input_ids": [[1, 2]], "loss_mask": [[1]], "seq_start_id": [[0]]}, "and 1 of loss_mask"),
        (
            {"input_ids": [[]], "loss_mask": [[]], "seq_start_id": [[]]},
            "cannot be read|has 0 input",
        ),
        ({"input_ids": [[1, 2]], "loss_mask": [[1, 0]], "seq_start_id": [[1]]}, "up from 0"),
        ({"input_ids": [[1, 2]], "loss_mask": [[1, 0]], "seq_start_id": [[0, 0]]}, "up from 0"),
        ({"input_ids": [[1, 2]], "loss_mask": [[1, 0]], "seq_start_id": [[0, 2]]}, "up from 0"),
        ({"input_ids": [[1, 57]], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "token 57, where"),
        ({"input_ids": [[-1, 5]], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "token -1, where"),
        ({"input_ids": [[1, 1 << 40]], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "cannot be"),
        ({"input_ids": [["a", "b"]], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "cannot be"),
        ({"input_ids": [[1, None]], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "has nulls"),
        ({"input_ids": [5], "loss_mask": [[1, 0]], "seq_start_id": [[0]]}, "cannot be read"),
    ],
)
def test_strangers_files(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "packs.parquet"
    parquet.write_table(arrow.table(columns), path)
    with pytest.raises(CheckpointError, match=message):
        _ = PackedFile(path, 57)[0]


def test_files_of_others_in_wider_types(tmp_path: Path) -> None:
    path = tmp_path / "packs.parquet"
    columns = {"input_ids": [[3, 4, 5]], "loss_mask": [[False, True, False]], "seq_start_id": [[0]]}
    parquet.write_table(arrow.table(columns), path)  # int64 and bool
    file = PackedFile(path, 57)
    assert file.facts == {}
    assert [values.tolist() for values in file[0]] == [[3, 4, 5], [0, 1, 0], [0]]


def test_damaged_metadata_and_damaged_bytes(tmp_path: Path) -> None:
    path = tmp_path / "packs.parquet"
    write_packs(path, _packs(), {})
    table = parquet.read_table(path)
    parquet.write_table(table.replace_schema_metadata({b"gptoss-convert": b"{"}), path)
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        PackedFile(path, 57)
    write_packs(path, _packs(), {})
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="row group 0 cannot be read"):
        _ = PackedFile(path, 57)[0]
    path.write_bytes(bytes(data[:100]))
    with pytest.raises(CheckpointError, match="is no Parquet file"):
        PackedFile(path, 57)
