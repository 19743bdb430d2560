"""``data preprocess``: the bytes that megatron-core's own builder writes, however the work went."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_convert.errors import CheckpointError, IncompleteError, UsageError
from gptoss_plugins.data import preprocess as module
from gptoss_plugins.data import units
from gptoss_plugins.data.preprocess import Job, preprocess
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
        ("{", "is no JSON at byte 16"),
        ("[1]", "the line at byte 16 has no text under 'text'"),
        ('{"text": 3}', "has no text under 'text'"),
        ('{"other": "x"}', "has no text under 'text'"),
        ("[" * 100_000, "is no JSON at byte 16"),
    ],
)
def test_damaged_lines(line: str, message: str, job: Job, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n' + line + "\n")
    with pytest.raises(CheckpointError, match=message):
        preprocess([tmp_path / "d.jsonl"], tmp_path / "set", job)
    assert not (tmp_path / "set.bin").exists()


def test_what_makes_no_sense(job: Job, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.txt").write_text("x")
    for inputs, prefix, message in [
        (tmp_path / "none.jsonl", tmp_path / "set", "is not there"),
        (tmp_path / "empty", tmp_path / "set", "has no file that ends in"),
        (tmp_path / "d.txt", tmp_path / "set", "ends in none of"),
        (source, tmp_path / "no" / "set", "is no folder"),
    ]:
        with pytest.raises(UsageError, match=message):
            preprocess([inputs], prefix, job)
    preprocess([source], tmp_path / "set", job)
    with pytest.raises(UsageError, match="say --overwrite"):
        preprocess([source], tmp_path / "set", job)


def test_command(job: Job, source: Path, tmp_path: Path, invoke: Any) -> None:
    tokenizer = job.files["tokenizer.json"].parent
    command = ["data", "preprocess", "--input", source, "--output-prefix", tmp_path / "set"]
    done = invoke(*command, "--tokenizer", tokenizer, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("500 documents, ")
    done = invoke(*command, "--overwrite")
    assert done.returncode == 2
    assert "name a tokenizer" in done.stderr
