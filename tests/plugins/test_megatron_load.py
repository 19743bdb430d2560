"""An imported checkpoint, loaded by megatron-core itself at several parallel layouts.

Each case starts a small gloo world (tests/support/load_and_compare.py): every parameter must be
bit-equal to its part of the Hugging Face tensors, and the float32 logits those of transformers.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gptoss_convert.convert import import_checkpoint
from gptoss_convert.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

# megatron-core warns at import that Transformer Engine and Apex are missing.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

SUPPORT = Path(__file__).parents[1] / "support"
SQUARE = {"intermediate_size": 48, "num_hidden_layers": 4, "seed": 3}


def imported(folder: Path, **sizes: Any) -> SimpleNamespace:
    """A tiny model's Hugging Face folder, and what our importer makes of it."""
    tiny = runpy.run_path(str(SUPPORT / "tiny_gptoss.py"))
    tiny["tiny_model"](**sizes).bfloat16().save_pretrained(folder / "hf")
    import_checkpoint(folder / "hf", folder / "megatron")
    return SimpleNamespace(hf=folder / "hf", megatron=folder / "megatron" / "iter_0000000")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return imported(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """As in the released models, where a transposed expert has the right shape."""
    return imported(tmp_path_factory.mktemp("square"), **SQUARE)


def load(hf: Path, megatron: Path, ranks: int, *flags: str) -> tuple[int, dict[str, Any]]:
    """The script's exit code, and what it found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(SUPPORT / "load_and_compare.py")]
    command += ["--checkpoint", str(megatron), "--hf-model", str(hf), *flags]
    quick = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | quick, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.startswith("{"), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "flags"),
    [
        pytest.param(1, 1, 1, ["--run-config"], marks=pytest.mark.slow),
        pytest.param(2, 1, 1, [], marks=pytest.mark.slow),
        pytest.param(1, 2, 1, [], marks=pytest.mark.slow),
        pytest.param(1, 1, 2, [], marks=pytest.mark.slow),
        pytest.param(2, 1, 2, [], marks=pytest.mark.slow),
        pytest.param(2, 2, 2, ["--sequence-parallel"], marks=pytest.mark.slow),
    ],
)
def test_logits_at_every_layout(
    plain: SimpleNamespace, tp: int, pp: int, ep: int, flags: list[str]
) -> None:
    ranks = max(tp, ep) * pp  # expert parallelism takes its ranks from tensor parallelism
    layout = [f"--tp={tp}", f"--pp={pp}", f"--ep={ep}"]
    code, found = load(plain.hf, plain.megatron, ranks, *layout, *flags)
    assert (code, found["unequal"]) == (0, [])
    assert found["rel_l2"] < 1e-5
    assert found["argmax_equal"] == 1.0


@pytest.mark.slow
def test_square_experts(square: SimpleNamespace) -> None:
    code, found = load(square.hf, square.megatron, 2, "--tp=2", "--ep=2")
    assert (code, found["unequal"]) == (0, [])
    assert found["rel_l2"] < 1e-5


@pytest.mark.slow
def test_stock_megatron_reads_it(plain: SimpleNamespace) -> None:
    code, found = load(plain.hf, plain.megatron, 1, "--spec=stock-local")
    assert (code, found["unequal"]) == (0, [])
    assert found["pieces"] == 3 + 6 * (9 + 8 * (2 * 2 + 2))


@pytest.mark.slow
def test_another_model_is_told_apart(
    plain: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = imported(tmp_path_factory.mktemp("other"), seed=1)
    code, found = load(other.hf, plain.megatron, 1)
    assert code == 1
    assert found["unequal"]
    assert found["rel_l2"] > 1e-2


# --- what is refused, in a world of one ----------------------------------------------------------


@pytest.fixture
def gpt() -> Iterator[Any]:
    from gptoss_plugins.gpt_model import build

    build.initialize_parallel(device="cpu")
    yield build
    build.shut_down_parallel()


def fields_of(case: SimpleNamespace) -> dict[str, Any]:
    tiny = runpy.run_path(str(SUPPORT / "tiny_gptoss.py"))
    return tiny["megatron_fields"](json.loads((case.hf / "config.json").read_text()))


def test_other_sizes_are_refused(gpt: Any, plain: SimpleNamespace) -> None:
    sizes = {"moe_ffn_hidden_size": 40, "num_layers": 4, "window_attn_skip_freq": 2}
    model = gpt.build_gpt_model(fields_of(plain) | sizes)
    with pytest.raises(PlanError) as caught:
        gpt.load_checkpoint(model, plain.megatron)
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert f"{key}: is (6, 8, 48, 36), the model's is (4, 8, 48, 40)" in str(caught.value)
    assert len(caught.value.problems) == 13  # all that has layers


def test_surplus_tensors_are_refused(gpt: Any, plain: SimpleNamespace) -> None:
    fields = fields_of(plain) | {"softmax_type": "vanilla"}
    with pytest.raises(PlanError, match="softmax_offset: the model has no such tensor"):
        gpt.load_checkpoint(gpt.build_gpt_model(fields), plain.megatron)


def test_a_folder_without_a_checkpoint(gpt: Any, plain: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="iter_"):
        gpt.load_checkpoint(gpt.build_gpt_model(fields_of(plain)), tmp_path)


def test_the_root_will_do_and_extra_states_may_be_missing(
    gpt: Any, plain: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(plain.megatron.parent, tmp_path / "root")
    listing = tmp_path / "root" / plain.megatron.name / ".metadata"
    metadata = pickle.loads(listing.read_bytes())
    for key in [key for key in metadata.state_dict_metadata if "_extra_state" in key]:
        del metadata.state_dict_metadata[key]
    listing.write_bytes(pickle.dumps(metadata))
    gpt.load_checkpoint(gpt.build_gpt_model(fields_of(plain)), tmp_path / "root")
