"""``gptoss-convert reshard`` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptoss_convert.convert import export_checkpoint, import_checkpoint


def weights(folder: Path) -> dict[str, Any]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_there_and_back(
    megatron: Path, originals: dict[str, Path], tmp_path: Path, invoke: Any, content: Any
) -> None:
    files, back = tmp_path / "files", tmp_path / "back"
    layout = ("--tp", 2, "--pp", 3, "--ep", 5, "--format", "torch")
    done = invoke("reshard", "--megatron-path", megatron, "--output", files, *layout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resharded gpt-oss")
    folders = {p.name for p in (files / "iter_0000000").iterdir() if p.name.startswith("mp_rank")}
    grid = {f"mp_rank_{r % 2:02d}_{pp:03d}_{r % 5:03d}" for r in range(10) for pp in range(3)}
    assert folders == grid  # the smallest world that has them all is 10 ranks by stage
    done = invoke("reshard", "--megatron-path", files, "--output", back, "--json")
    assert json.loads(done.stdout)["direction"] == "reshard"
    assert content(back) == content(megatron)
    export_checkpoint(files, tmp_path / "hf")
    ours, theirs = weights(tmp_path / "hf"), weights(originals["bf16"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kept_scales_go_along(
    originals: dict[str, Path], tmp_path: Path, tree: Any, invoke: Any
) -> None:
    import_checkpoint(originals["mxfp4"], tmp_path / "a", workers=1)
    words = ("--format", "torch", "--ep", 5)
    done = invoke("reshard", "--megatron-path", tmp_path / "a", "--output", tmp_path / "b", *words)
    assert done.returncode == 0, done.stderr
    export_checkpoint(tmp_path / "b", tmp_path / "c", export_dtype="mxfp4")
    ours, theirs = weights(tmp_path / "c"), weights(originals["mxfp4"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rounding_is_said(imported: Path, tmp_path: Path, invoke: Any) -> None:
    target = tmp_path / "out"
    words = ("--torch-dtype", "float16")
    done = invoke("reshard", "--megatron-path", imported, "--output", target, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(invoke("inspect", target, "--json").stdout)
    assert set(found["bytes_by_dtype"]) == {"F16"}


REFUSED = [
    (["--tp", 3], "--tp 3 does not divide the 2 key-value groups; the nearest that works is 2"),
    (["--ep", 2], "--ep 2 does not divide the 5 experts; the nearest that works is 1"),
    (["--pp", 2], "--pp 2 does not divide the 3 layers; the nearest that works is"),
    (["--etp", 5, "--ep", 5], "--etp 5 does not divide the 96 rows of gate and of up"),
    (["--pp", 3, "--decoder-first-pipeline-num-layers", 2], "layers"),
    (["--pp", 2, "--pipeline-layers", "2,2"], "with that sum"),
    (["--pipeline-layers", "2;1"], "is no list of numbers"),
    (["--dialect", "sideways"], "has none of that name; stacked or per-layer"),
    (["--format", "torch", "--dialect", "stacked"], "te-grouped"),
    (["--format", "zarr"], "zarr"),
    (["--tp", 0], "--tp"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_what_cannot_be(
    imported: Path, tmp_path: Path, invoke: Any, words: list[Any], sentence: str
) -> None:
    done = invoke("reshard", "--megatron-path", imported, "--output", tmp_path / "out", *words)
    assert done.returncode in (1, 2), done.stdout
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing(imported: Path, tmp_path: Path, invoke: Any) -> None:
    assert "--output" in invoke("reshard", "--megatron-path", imported).stderr
    assert "--megatron-path" in invoke("reshard", "--output", tmp_path / "out").stderr
    done = invoke("reshard", "--megatron-path", tmp_path, "--output", tmp_path / "out")
    assert "holds no checkpoint in the format" in done.stderr
    inside = imported / "out"
    done = invoke("reshard", "--megatron-path", imported, "--output", inside)
    assert "lies in it" in done.stderr
    assert not inside.exists()


def test_plan_counts_every_copy(imported: Path, tmp_path: Path, invoke: Any) -> None:
    words = ("--megatron-path", imported, "--output", tmp_path / "out", "--format", "torch")
    one = json.loads(invoke("plan", *words, "--json").stdout)
    many = json.loads(invoke("plan", *words, "--tp", 2, "--ep", 5, "--json").stdout)
    assert (one["direction"], many["layout"]["ep"]) == ("reshard", 5)
    done = invoke("reshard", *words, "--tp", 2, "--ep", 5, "--json")
    assert json.loads(done.stdout)["bytes_out"] == many["bytes_out"] > one["bytes_out"]
    files = list((tmp_path / "out").rglob("*.pt"))
    assert len(files) == 10
    size = sum(file.stat().st_size for file in files)
    assert many["bytes_out"] < size < many["disk_needed"]


def test_plan_refuses_a_layout_where_none_is_written(imported: Path, invoke: Any) -> None:
    done = invoke("plan", "--megatron-path", imported, "--pipeline-layers", "1,2")
    assert done.returncode == 2
    assert "--pipeline-layers: does not go with export" in done.stderr


def test_a_reference_where_nothing_tells_the_model(
    megatron: Path, originals: dict[str, Path], tmp_path: Path, invoke: Any, content: Any
) -> None:
    before = content(megatron)
    for name in ("run_config.yaml", "common.pt", "huggingface", "tokenizer"):
        path = megatron / "iter_0000000" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = ("reshard", "--megatron-path", megatron, "--output", tmp_path / "out")
    assert "--hf-model" in invoke(*words).stderr
    done = invoke(*words, "--hf-model", originals["bf16"])
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == before


def test_the_other_side_s_format_is_refused(imported: Path, tmp_path: Path, invoke: Any) -> None:
    words = ("--megatron-path", imported, "--output", tmp_path / "out", "--format", "huggingface")
    assert "is no format of Megatron; choose" in invoke("reshard", *words).stderr
    done = invoke("export", "--megatron-path", imported, "--hf-path", tmp_path, "--format", "torch")
    assert "is no torch checkpoint, which --format asks for" in done.stderr


def test_overwrite_replaces_its_own_kind(
    imported: Path, hf: Path, tmp_path: Path, invoke: Any, tree: Any
) -> None:
    before = tree(hf)
    done = invoke("reshard", "--megatron-path", imported, "--output", hf, "--overwrite")
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert tree(hf) == before


def test_no_piece_is_made_of_a_layout_that_does_not_divide(imported: Path, invoke: Any) -> None:
    """The embedding, which is padded to whatever it is, would be cut into these first."""
    command = ["reshard", "--megatron-path", imported, "--output", imported.parent / "never"]
    for format_ in ("torch_dist", "torch"):
        done = invoke(*command, "--tp", 10**15, "--format", format_)
        assert done.returncode == 2
        assert f"--tp {10**15} does not divide the 2 key-value groups" in done.stderr
