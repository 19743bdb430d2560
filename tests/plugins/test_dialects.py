"""What megatron-core's own code writes is read, in all its ways to name things, and ours by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert.convert import export_checkpoint, import_checkpoint
from gptoss_convert.damage import check_manifest
from gptoss_convert.errors import UsageError
from gptoss_convert.inspection import inspect_source
from gptoss_convert.manifest import read_manifest
from gptoss_convert.opening import Choice, open_source
from gptoss_convert.registry import default_registry
from gptoss_convert.reshard import prepare_reshard

# megatron-core warns at import that Transformer Engine and Apex are missing.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

SUPPORT = Path(__file__).parents[1] / "support"
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_local_experts": 6,
    "vocab_size": 130,
}


def script(name: str, ranks: int, *words: object) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(SUPPORT / name)]
    quick = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, words)],
        env=os.environ | quick,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def case(write_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model; as megatron-core writes it from one rank, and from two while it is trained."""
    folder = tmp_path_factory.mktemp("dialects")
    hf = write_tiny(folder / "hf", **SIZES)
    import_checkpoint(hf, folder / "ours")
    import_checkpoint(hf, folder / "per-layer", dialect="per-layer")
    words = ("--from", folder / "ours" / "iter_0000000", "--config", hf / "config.json", "--to")
    stock, trained = folder / "stock" / "iter_0000007", folder / "trained" / "iter_0000007"
    script("write_megatron.py", 1, *words, stock, "--spec=stock-local")
    more = ("--per-layer", "--vocab=160", "--optimizer", "--args")
    script("write_megatron.py", 2, *words, trained, "--tp=2", "--ep=2", *more)
    (trained.parent / "latest_checkpointed_iteration.txt").write_text("7")
    return SimpleNamespace(hf=hf, root=folder, stock=stock, trained=trained.parent)


def layout_of(folder: Path) -> dict[str, Any]:
    registry = default_registry()
    found = inspect_source(open_source(folder, "megatron"), registry, Choice(model="gpt-oss"))
    return dict(found["layout"])


@pytest.mark.slow
def test_stacked_keys_of_sequential_experts(case: SimpleNamespace, tmp_path: Path) -> None:
    assert layout_of(case.stock)["layers"] == "stacked keys"
    export_checkpoint(case.stock, tmp_path / "out", hf_model=case.hf)
    assert same(tmp_path / "out", case.hf)


def test_keys_per_layer_padding_and_optimizer(case: SimpleNamespace, tmp_path: Path) -> None:
    found = layout_of(case.trained)
    assert (found["layers"], found["optimizer_state"]) == ("one key per layer", True)
    export_checkpoint(case.trained, tmp_path / "out", hf_model=case.hf)
    assert same(tmp_path / "out", case.hf)


def test_the_config_comes_from_args(case: SimpleNamespace, tmp_path: Path) -> None:
    export_checkpoint(case.trained, tmp_path / "out")
    made, own = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", case.hf))
    assert {k for k in made if k in own and made[k] != own[k]} == set()
    assert same(tmp_path / "out", case.hf)


@pytest.mark.slow
def test_ours_per_layer_is_read_by_megatron_core(case: SimpleNamespace) -> None:
    words = ("--checkpoint", case.root / "per-layer" / "iter_0000000", "--hf-model", case.hf)
    found = json.loads(script("load_and_compare.py", 2, *words, "--tp=2", "--ep=2"))
    assert found["unequal"] == []
    assert found["rel_l2"] < 1e-5


def test_dialects_and_back(case: SimpleNamespace, tmp_path: Path, content: Any) -> None:
    prepare_reshard(case.root / "ours", dialect="per-layer").run(tmp_path / "there")
    assert content(tmp_path / "there") == content(case.root / "per-layer")
    prepare_reshard(tmp_path / "there").run(tmp_path / "back")
    assert content(tmp_path / "back") == content(case.root / "ours")


def loaded(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint, by torch itself."""
    reader = dcp.FileSystemReader(folder)
    states = reader.read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(state.size, dtype=state.properties.dtype)
        for key, state in states.items()
        if hasattr(state, "size")
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def test_optimizer_state_is_carried_unchanged(case: SimpleNamespace, tmp_path: Path) -> None:
    prepare_reshard(case.trained, dialect="per-layer").run(tmp_path / "out")
    before, after = (f / "iter_0000007" for f in (case.trained, tmp_path / "out"))
    theirs, ours = loaded(before), loaded(after)
    momenta = {key for key in theirs if key.startswith("optimizer.state.exp_avg.")}
    assert len(momenta) == 2 + 1 + 4 * (9 + 4)
    second_name = ".mlp.linear_fc1.layer_norm_weight"
    assert {key for key in ours if not key.endswith(second_name)} == theirs.keys()
    padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
    for key, tensor in theirs.items():
        rows = SIZES["vocab_size"] if key in padded else len(tensor)
        assert torch.equal(ours[key], tensor[:rows]), key
        assert ours[key].dtype == tensor.dtype
    assert (before / "common.pt").read_bytes() == (after / "common.pt").read_bytes()
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "7"
    files = read_manifest(tmp_path / "out").files
    carried = {
        s.name.partition("[")[0] for n, f in files.items() if "__state" in n for s in f.tensors
    }
    assert {key for key in theirs if key.startswith("optimizer.")} <= carried
    assert list(check_manifest(tmp_path / "out")) == []


@pytest.mark.parametrize("choice", [Choice(), Choice(format="torch")])
def test_optimizer_state_is_refused_where_it_would_be_lost(
    case: SimpleNamespace, tmp_path: Path, choice: Choice
) -> None:
    with pytest.raises(UsageError, match=r"optimizer's state.*--no-optimizer"):
        prepare_reshard(case.trained, choice=choice)
    if choice.format is None:
        prepare_reshard(case.trained, optimizer=False).run(tmp_path / "out")
        assert not any(k.startswith("optimizer") for k in loaded(tmp_path / "out" / "iter_0000007"))
        export_checkpoint(tmp_path / "out", tmp_path / "hf", hf_model=case.hf)
        assert same(tmp_path / "hf", case.hf)
