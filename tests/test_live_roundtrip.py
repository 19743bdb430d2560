"""``roundtrip``: the real parallel model over gloo, its weights gathered and its logits compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert.convert import import_checkpoint
from gptoss_convert.testing import write_hf_folder

Run = Callable[..., subprocess.CompletedProcess[str]]
SINKS = "model.layers.1.self_attn.sinks"
# (tp, pp, vpp, ep), ranks
LAYOUTS = [
    ((2, 1, 1, 1), 2),
    ((1, 2, 1, 1), 2),
    ((1, 1, 1, 2), 2),
    ((2, 2, 1, 1), 4),
    ((2, 1, 1, 2), 2),
    ((2, 2, 1, 2), 4),
    ((4, 1, 1, 2), 4),
    ((1, 2, 2, 1), 2),
    ((2, 2, 2, 2), 8),
]
IN_CI = (((2, 2, 1, 2), 4),)


@pytest.fixture(scope="module")
def model(write_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that every layout divides."""
    sizes = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 140,
    }
    folder: Path = write_tiny(tmp_path_factory.mktemp("model") / "hf", mxfp4=True, **sizes)
    return folder


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "mg"
    import_checkpoint(model, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def command_of(model: Path, megatron: Path, *more: object) -> list[str]:
    names = ["--hf-model-id", model, "--megatron-load-path", megatron, "--prompt-length", 140]
    return list(map(str, ["roundtrip", *names, *more]))


def launched(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launch, "-m", "gptoss_convert", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [pytest.param(*case, marks=() if case in IN_CI else pytest.mark.slow) for case in LAYOUTS],
)
def test_every_layout(sizes: tuple[int, ...], ranks: int, model: Path, megatron: Path) -> None:
    tp, pp, vpp, ep = sizes
    layout = ["--tp", tp, "--pp", pp, "--vpp", vpp, "--ep", ep]
    done = launched(ranks, *command_of(model, megatron, *layout, "--trust-remote-code", "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert (found["ok"], found["world"]) == (True, ranks)
    assert all(tensor["match"] for tensor in found["tensors"])
    names = {n.removesuffix("_blocks") for n in tensors_of(model) if not n.endswith("_scales")}
    assert {tensor["name"] for tensor in found["tensors"]} == names
    assert found["logits"]["positions"] == 140
    assert 0 < found["logits"]["relative_error"] < 1e-5


def test_alone(model: Path, megatron: Path, invoke: Run) -> None:
    done = invoke(*command_of(model, megatron))
    assert done.returncode == 0, done.stderr
    assert "tensors match; 1 ranks" in done.stdout
    assert "logits of 140 positions: ok" in done.stdout


@pytest.mark.slow
def test_legacy_files(model: Path, tmp_path: Path, invoke: Run) -> None:
    layout = ["--format", "torch", "--tp", "2", "--ep", "2"]
    command = ["import", "--hf-model", model, "--megatron-path", tmp_path / "mg", *layout]
    assert invoke(*command).returncode == 0
    done = invoke(*command_of(model, tmp_path / "mg", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


def test_other_weights(model: Path, tmp_path: Path, invoke: Run) -> None:
    """A mismatch has exit code 3, its row, and shows in the logits."""
    tensors = tensors_of(model)
    tensors[SINKS] = tensors[SINKS].flip(0).contiguous()
    config = json.loads((model / "config.json").read_bytes())
    write_hf_folder(tmp_path / "hf", config, tensors, shards=1, files={})
    import_checkpoint(tmp_path / "hf", tmp_path / "mg")
    done = invoke(*command_of(model, tmp_path / "mg", "--json"))
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert [t["name"] for t in found["tensors"] if not t["match"]] == [SINKS]
    assert found["logits"]["relative_error"] > found["logits_limit"]
    done = invoke(*command_of(model, tmp_path / "mg", "--no-logits"))
    assert done.returncode == 3
    assert "NO, off by" in done.stdout


def test_weights_that_are_not_finite(
    model: Path, megatron: Path, tmp_path: Path, invoke: Run
) -> None:
    """The row says so, and JSON has null where a figure is not defined."""
    tensors = tensors_of(model)
    tensors[SINKS][0] = math.nan
    config = json.loads((model / "config.json").read_bytes())
    write_hf_folder(tmp_path / "hf", config, tensors, shards=1, files={})
    done = invoke(*command_of(tmp_path / "hf", megatron, "--no-logits"))
    assert done.returncode == 3, done.stderr
    assert "NO, NaN or infinite in 1, in the model 0" in done.stdout
    done = invoke(*command_of(tmp_path / "hf", megatron, "--json"))
    assert done.returncode == 3
    assert done.stderr == ""  # of transformers' warnings too
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["logits"]["relative_error"] is None


def test_checkpoints_that_are_no_pair(
    model: Path, megatron: Path, write_tiny: Any, tmp_path: Path, invoke: Run
) -> None:
    """One sentence each."""
    other = write_tiny(tmp_path / "other", vocab_size=150)
    import_checkpoint(other, tmp_path / "mg")
    for one, two, code, says in (
        (model, model, 1, "--megatron-load-path takes a Megatron checkpoint"),
        (megatron, megatron, 1, "--hf-model-id takes a Hugging Face checkpoint"),
        (model, tmp_path / "mg", 3, "model.embed_tokens.weight has shape [150, "),
    ):
        done = invoke(*command_of(one, two))
        assert done.returncode == code, done.stderr
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tp", "2"], "needs 2 processes"),
        (["--etp", "2"], "leave --etp out"),
    ],
)
def test_what_does_not_fit(
    more: list[str], says: str, model: Path, megatron: Path, invoke: Run
) -> None:
    done = invoke(*command_of(model, megatron, *more))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


@pytest.mark.slow
def test_beyond_yarns_original_length(model: Path, megatron: Path, invoke: Run) -> None:
    done = invoke(*command_of(model, megatron, "--prompt-length", 4200))
    assert done.returncode == 0, done.stdout
    assert "logits of 4200 positions: ok" in done.stdout
