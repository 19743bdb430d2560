"""``data preprocess``: the bytes that megatron-core's own builder writes, however the work went."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_convert.errors import CheckpointError, IncompleteError, UsageError
from gptoss_plugins.data import preprocess as module
from gptoss_plugins.data import units
from gptoss_plugins.data.preprocess import Job, preprocess
from gptoss_plugins.data.records import records_in
from gptoss_plugins.infer.tokenizer import load_tokenizer

SUPPORT = Path(__file__).parents[1] / "support"
TEXTS = [f"Document {n}: " + "héllo to you, assistant. " * (n % 7) for n in range(500)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    tiny = SimpleNamespace(**runpy.run_path(str(SUPPORT / "tiny_tokenizer.py")))
    return Job("text", True, tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")), "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "documents.jsonl"
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines[:200]) + "\n\n" + "\n".join(lines[200:]))  # no end of line
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units of a small file."""
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)


@pytest.fixture(scope="module")
def expected(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """By megatron-core alone, in one go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder, tokenizer = tmp_path_factory.mktemp("expected"), load_tokenizer(job.files, job.where)
    builder = IndexedDatasetBuilder(
        str(folder / "all.bin"), dtype=DType.optimal_dtype(len(tokenizer))
    )
    for text in TEXTS:
        builder.add_item(torch.tensor([*tokenizer.encode(text), tokenizer.id_of("<|endoftext|>")]))
        builder.end_document()
    builder.finalize(str(folder / "all.idx"))
    return (folder / "all.bin").read_bytes(), (folder / "all.idx").read_bytes()


def made(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_of_megatron_core(
    workers: int, job: Job, source: Path, expected: Any, tmp_path: Path
) -> None:
    found = preprocess([source], tmp_path / "set", job, workers=workers)
    assert made(tmp_path / "set") == expected
    assert found["units"] > 5
    assert found["documents"] == len(TEXTS)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["set.bin", "set.idx"]


def test_zstd_and_parquet(job: Job, source: Path, expected: Any, tmp_path: Path) -> None:
    zstandard, arrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = source.read_bytes()
    frames = [data[:4000], data[4000:]]  # two frames, as tools that append write them
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "d.jsonl.zst").write_bytes(b"".join(map(compress, frames)))
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "d.parquet", row_group_size=77)
    for name in ("d.jsonl.zst", "d.parquet"):
        preprocess([tmp_path / name], tmp_path / "set", job, overwrite=True)
        assert made(tmp_path / "set") == expected


def test_rows_of_parquet_without_text(job: Job, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"text": ["a", "b", None, "d"], "id": [3, 4, 5, 6]}
    parquet.write_table(arrow.table(rows), tmp_path / "d.parquet", row_group_size=2)
    with pytest.raises(CheckpointError, match=r"d\.parquet: row 2 has no text under 'text'"):
        preprocess([tmp_path / "d.parquet"], tmp_path / "set", job)
    with pytest.raises(CheckpointError, match="has no column 'body', only text, id"):
        preprocess([tmp_path / "d.parquet"], tmp_path / "other", replace(job, key="body"))


@pytest.mark.parametrize("kept", [1, 3, 40, -1])  # of the last frame: within magic, header, data
def test_zstd_that_is_cut(kept: int, job: Job, source: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "d.jsonl.zst"
    data = source.read_bytes()
    first, last = map(zstandard.compress, (data[:4000], data[4000:]))
    path.write_bytes(first + last[:kept])
    with pytest.raises(CheckpointError, match=r"d\.jsonl\.zst: is cut off; fetch it again$"):
        preprocess([path], tmp_path / "set", job)
    with pytest.raises(CheckpointError, match=r"d\.jsonl\.zst: is cut off; fetch it again$"):
        [*records_in(units.units_of(path)[0])]  # as packing reads them
    assert not (tmp_path / "set.bin").exists()


def test_killed_and_run_again(job: Job, source: Path, expected: Any, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from gptoss_plugins.data import preprocess as module, units
units.UNIT_BYTES = 5000
tokenizer, source, prefix = map(Path, sys.argv[1:])
job = module.Job("text", True, {p.name: p for p in tokenizer.iterdir()}, "tiny")
module.preprocess([source], prefix, job, progress=lambda _: time.sleep(0.2))
"""
    tokenizer = job.files["tokenizer.json"].parent
    ends = [str(p) for p in (tokenizer, source, tmp_path / "set")]
    running = subprocess.Popen([sys.executable, "-c", code, *ends])
    while not (tmp_path / "set.parts" / "000002.idx").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set.parts").glob("*.idx")}
    assert not (tmp_path / "set.idx").exists()
    again: list[int] = []
    original = module.make_part

    def make_part(parts: Path, number: int, *rest: Any) -> None:
        again.append(number)
        original(parts, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_part", make_part)
        preprocess([source], tmp_path / "set", job)
    assert made(tmp_path / "set") == expected
    assert not {int(path.stem) for path in before} & set(again)


def test_an_unfinished_run_of_another_kind(job: Job, source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "set.parts"
    parts.mkdir()
    (parts / "plan.json").write_text("[]")
    (parts / "000000.idx").touch()
    with pytest.raises(IncompleteError, match="unfinished run of other inputs"):
        preprocess([source], tmp_path / "set", job)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"text": 3}', "has no text under 'text'"),
        ('{"other": "x"}', "has no text under 'text'"),
        (
            r'{"text": "ab\ud800"}',
            "has a 'text' with half a surrogate pair at character 2; mend it",
        ),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_damaged_lines(line: str, message: str, job: Job, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n' + line + "\n")
    with pytest.raises(CheckpointError, match=f"d.jsonl: line 2 {message}"):
        preprocess([tmp_path / "d.jsonl"], tmp_path / "set", job)
    assert not (tmp_path / "set.bin").exists()


def test_what_makes_no_sense(job: Job, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.txt").write_text("x")
    for inputs, prefix, message in [
        (tmp_path / "none.jsonl", tmp_path / "set", "is not there"),
        (tmp_path / "empty", tmp_path / "set", "has no file that ends in"),
        (tmp_path / "d.txt", tmp_path / "set", "ends in none of"),
    ]:
        with pytest.raises(UsageError, match=message):
            preprocess([inputs], prefix, job)
    preprocess([source], tmp_path / "set", job)
    with pytest.raises(UsageError, match="say --overwrite"):
        preprocess([source], tmp_path / "set", job)


def test_no_document(job: Job, tmp_path: Path, invoke: Any) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_text('\n{"text": ""}\n\n')
    tokenizer = job.files["tokenizer.json"].parent
    for names in (["a"], ["b"], ["a", "b"]):
        paths = [tmp_path / f"{name}.jsonl" for name in names]
        inputs = [word for path in paths for word in ("--input", path)]
        command = ["data", "preprocess", *inputs, "--output-prefix", tmp_path / "set"]
        done = invoke(*command, "--tokenizer", tokenizer, "--workers", 1)
        assert (done.returncode, done.stdout) == (1, "")
        told = ", ".join(map(str, paths))
        assert f"error: {told}: no document in it has any text; name" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_folders_are_made(job: Job, source: Path, expected: Any, tmp_path: Path) -> None:
    preprocess([source], tmp_path / "new" / "deep" / "set", job)
    assert made(tmp_path / "new" / "deep" / "set") == expected
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"set\.parts"):
        preprocess([source], tmp_path / "file" / "set", job)


def test_command(job: Job, source: Path, tmp_path: Path, invoke: Any) -> None:
    tokenizer = job.files["tokenizer.json"].parent
    command = ["data", "preprocess", "--input", source, "--output-prefix", tmp_path / "set"]
    done = invoke(*command, "--tokenizer", tokenizer, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("500 documents, ")
    done = invoke(*command, "--overwrite")
    assert done.returncode == 2
    assert "name a tokenizer" in done.stderr
