"""The MXFP4 benchmark says whether kernels are exact, and notices one that is not. No timings."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gptoss_kernels.mxfp4 import table

CPU = torch.device("cpu")
FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--device", "cpu", "--experts", "2", "--rows", "6", "--cols", "96", "--reps", "1"]
SMALL += ["--threads", "1", "--backends", "torch", "--peers", "", "--no-memory"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_mxfp4")


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def flip(tensor: torch.Tensor) -> None:
    """Change one bit, in the middle."""
    flat = tensor.reshape(-1).view(torch.uint8)
    flat[len(flat) // 2] ^= 1
    tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))


@pytest.mark.slow
def test_check_only_passes() -> None:
    command = [sys.executable, str(FOLDER / "bench_mxfp4.py"), "--check-only", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_line(done.stdout)
    assert result["exact"] is True
    assert {"table", "reference"} <= result.keys()
    for backend in result.keys() - {"device", "check", "exact"}:
        assert result[backend] == {"finite": 2034, "kept": 2034, "wrong": []}


def test_a_decoder_with_one_wrong_bit_is_caught(bench, monkeypatch, capsys) -> None:
    right = table.decode

    def decode(blocks: torch.Tensor, scales: torch.Tensor, view: torch.Tensor) -> None:
        right(blocks, scales, view)
        flip(view)

    monkeypatch.setattr(table, "decode", decode)
    assert bench.main(["--check-only", "--device", "cpu", "--backends", "table"]) == 1
    result = last_line(capsys.readouterr().out)
    assert result["exact"] is False
    assert {f"decode {layout}" for layout in bench.LAYOUTS} <= set(result["table"]["wrong"])
    assert bench.main([*SMALL, "--op", "dequant"]) == 1
    assert last_line(capsys.readouterr().out)["exact"] is False


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_an_encoder_with_one_wrong_bit_is_caught(bench, monkeypatch, capsys, part) -> None:
    right = table.encode

    def encode(view, rule, hint, blocks, scales) -> None:
        right(view, rule, hint, blocks, scales)
        flip({"blocks": blocks, "scales": scales}[part])

    monkeypatch.setattr(table, "encode", encode)
    assert bench.main(["--check-only", "--device", "cpu", "--backends", "table"]) == 1
    wrong = last_line(capsys.readouterr().out)["table"]["wrong"]
    assert all(name.startswith("encode") for name in wrong)
    assert len(wrong) == sum(name.startswith("encode") for name, _ in bench.checks(CPU))
    assert bench.main([*SMALL, "--op", "quant"]) == 1
    assert last_line(capsys.readouterr().out)["exact"] is False


def test_what_is_not_written_is_caught(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(table, "decode", lambda *_: None)
    monkeypatch.setattr(table, "encode", lambda *_: None)
    assert bench.main(SMALL) == 1
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("dequant", "quant", "round"))]
    assert len(rows) == 15
    assert all(" NO " in row for row in rows)


def test_rows_goals_and_the_file(bench, tmp_path, capsys) -> None:
    path = tmp_path / "figures.json"
    assert bench.main([*SMALL, "--json", str(path)]) == 0
    result = last_line(capsys.readouterr().out)
    whole = json.loads(path.read_text())
    assert {key: whole[key] for key in result} == result
    assert len(whole["rows"]) == 15
    assert all(row["exact"] == "yes" for row in whole["rows"])
    assert {"table dequant natural / copy, 1 thread"} <= {goal["goal"] for goal in result["goals"]}
    assert bench.main([*SMALL, "--op", "dequant", "--min-ratio", "1e9"]) == 1


def test_a_peer_that_is_not_there_is_left_out(bench, capsys, tmp_path) -> None:
    options = ["--peers", "bridge", "--peer-path", str(tmp_path), "--op", "dequant"]
    assert bench.main([*SMALL, *options]) == 0
    reason = last_line(capsys.readouterr().out)["peers_left_out"]["bridge"]
    assert "--peer-path" in reason or "megatron" in reason
