"""``verify`` says of sound checkpoints that they are, of others what is wrong, and never the reverse."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert.compare import difference
from gptoss_convert.convert import export_checkpoint, import_checkpoint
from gptoss_convert.scratch import Scratch
from gptoss_convert.testing import write_hf_folder

Run = Callable[..., subprocess.CompletedProcess[str]]
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1."
DOWN, GATE_UP = f"{LAYER}mlp.experts.down_proj", f"{LAYER}mlp.experts.gate_up_proj"
SINKS = f"{LAYER}self_attn.sinks"
MISMATCH = 3


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def put(folder: Path, like: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors with the config of another folder."""
    config = json.loads((like / "config.json").read_bytes())
    return write_hf_folder(folder, config, tensors, shards=2, files={})


def damaged(like: Path, folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    tensors = tensors_of(like)
    tensors[name] = change(tensors[name]).contiguous()
    return put(folder, like, tensors)


def edit_run_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    import yaml

    (path,) = folder.glob("iter_*/run_config.yaml")
    document = yaml.safe_load(path.read_text())
    change(document["model"])
    path.write_text(yaml.safe_dump(document))


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of a config.json; ``...`` takes one out."""
    config = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def without_manifest(like: Path, folder: Path) -> Path:
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def facts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == "gptoss-convert.verify/1"
    assert found["sound"] == (done.returncode == 0)
    return found


@pytest.fixture(scope="module")
def forms(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every form that this program reads."""
    folder = tmp_path_factory.mktemp("forms")
    import_checkpoint(originals["mxfp4"], folder / "torch_dist")
    export_checkpoint(folder / "torch_dist", folder / "bf16", export_dtype="bfloat16")
    export_checkpoint(folder / "torch_dist", folder / "float32", export_dtype="float32")
    return {
        "mxfp4": originals["mxfp4"],
        **{n: folder / n for n in ("torch_dist", "bf16", "float32")},
    }


@pytest.fixture(scope="module")
def legacy(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in per-rank files, with a padded vocabulary."""
    from gptoss_convert.cli import main

    folder = tmp_path_factory.mktemp("legacy") / "torch"
    command = ["import", "--hf-model", originals["mxfp4"], "--megatron-path", folder]
    layout = [
        "--format",
        "torch",
        "--tp",
        "2",
        "--ep",
        "5",
        "--make-vocab-size-divisible-by",
        "128",
    ]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, [*command, *layout])))
    assert ended.value.code == 0
    return folder


# ---- sound ones


PAIRS = list(itertools.product(["mxfp4", "torch_dist", "bf16", "float32", "torch"], repeat=2))


@pytest.mark.parametrize(  # in CI those that go through MXFP4's decoding once
    ("one", "two"),
    [pytest.param(*p, marks=() if p[0] == "mxfp4" else pytest.mark.slow) for p in PAIRS],
)
def test_the_same_model_in_two_forms(
    one: str, two: str, forms: dict[str, Path], legacy: Path, invoke: Run
) -> None:
    places = {**forms, "torch": legacy}
    done = invoke("verify", places[one], places[two], "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = facts(done)
    assert found["findings"] == []
    tensors = tensors_of(forms["bf16"])
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    for tensor in found["tensors"]:
        assert tensor["equal"] == tensor["elements"] == tensors[tensor["name"]].numel()
        assert (tensor["max_error"], tensor["relative_error"], tensor["cosine"]) == (0, 0, 1)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_second_is_judged_by_the_first(
    swapped: bool, forms: dict[str, Path], invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a path is spelled, and whichever carries its config in its root."""
    monkeypatch.setenv("HOME", str(forms["torch_dist"].parent))
    places = ["~/torch_dist", forms["float32"]]
    kinds = ["torch_dist", "huggingface"]
    command = ["verify", *(places[::-1] if swapped else places), "--json"]
    found = facts(invoke(*command))
    assert found["formats"] == (kinds[::-1] if swapped else kinds)
    dtypes = ["F32", "BF16"] if swapped else ["BF16", "F32"]
    assert all(tensor["dtypes"] == dtypes for tensor in found["tensors"])


@pytest.mark.parametrize("form", ["mxfp4", "torch_dist", "bf16", "torch"])
def test_one_by_itself(form: str, forms: dict[str, Path], legacy: Path, invoke: Run) -> None:
    for more in ([], ["--values"]):
        done = invoke("verify", {**forms, "torch": legacy}[form], *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sound" in done.stdout


# ---- figures


def test_the_figures_are_those_of_the_definition() -> None:
    noise = torch.Generator().manual_seed(1)
    one = torch.randn(7, 3, 96, generator=noise).bfloat16()
    two = (one.float() * (1 + 0.01 * torch.randn(one.shape, generator=noise))).float()
    one[3, 1, 5], two[3, 1, 5], two[0, 0, 0] = math.nan, math.nan, math.inf
    one[1], two[1] = 0.0, -0.0
    found = difference(one, two, Scratch(), block=32)
    x, y = one.double(), two.double()
    finite = x.isfinite() & y.isfinite()
    a, b = x[finite], y[finite]
    equal = (x == y) & (x.signbit() == y.signbit()) | (x.isnan() & y.isnan())
    assert (found.elements, found.equal) == (x.numel(), int(equal.sum()))
    assert found.nonfinite == (1, 2)
    assert found.largest == pytest.approx(float((b - a).abs().max()), rel=1e-6)
    assert found.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert found.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-6)
    assert (found.blocks, found.equal_blocks) == (63, int(equal.view(-1, 32).all(1).sum()))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e37])
def test_equal_values_of_any_size_and_order(scale: float) -> None:
    x = (torch.randn(5, 8, 64, generator=torch.Generator().manual_seed(2)) * scale).bfloat16()
    y = x.transpose(0, 2).contiguous().transpose(0, 2)
    found = difference(x, y, Scratch(), block=32)
    assert found.is_equal
    assert found.blocks == found.equal_blocks == 80
    assert (found.largest, found.relative, found.cosine) == (0.0, 0.0, 1.0)
    power = float(x.double().square().sum())
    assert found.powers == pytest.approx((power, power), rel=1e-5)
    y = y.clone()
    y[4, 7, 63] = -y[4, 7, 63]
    found = difference(x, y, Scratch(), block=32)
    assert found.elements - found.equal == found.blocks - found.equal_blocks == 1


def test_what_quantization_cost(forms: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """The share of blocks that kept everything, and errors within a tolerance or not."""
    noise = torch.Generator().manual_seed(5)

    def move(weight: Tensor) -> Tensor:
        moved = weight.clone()
        moved[0] = (
            moved[0].float() * (1 + 0.02 * torch.randn(moved[0].shape, generator=noise))
        ).bfloat16()
        return moved

    trained = damaged(forms["bf16"], tmp_path / "trained", DOWN, move)
    import_checkpoint(trained, tmp_path / "mg")
    export_checkpoint(tmp_path / "mg", tmp_path / "out", export_dtype="mxfp4")
    command = ["verify", tmp_path / "mg", tmp_path / "out"]
    found = facts(invoke(*command, "--json"))
    (moved,) = (t for t in found["tensors"] if t["equal"] < t["elements"])
    assert moved["name"] == DOWN
    experts = moved["shape"][0]
    assert moved["blocks"] == moved["elements"] // 32
    assert (experts - 1) / experts <= moved["equal_blocks"] / moved["blocks"] < 1
    one, two = tensors_of(trained)[DOWN].double(), natural(tmp_path / "out", DOWN)
    assert moved["max_error"] == pytest.approx(float((two - one).abs().max()))
    assert moved["relative_error"] == pytest.approx(float((two - one).norm() / one.norm()))
    assert [f["where"] for f in found["findings"]] == [DOWN]
    done = invoke(*command)
    assert done.returncode == MISMATCH
    allowed = re.search(r"--tolerance (\S+)", done.stdout)
    assert allowed
    assert invoke(*command, "--tolerance", allowed[1]).returncode == 0
    assert invoke(*command, "--tolerance", "1e-6").returncode == MISMATCH


def natural(folder: Path, name: str) -> Tensor:
    """An MXFP4 tensor of a folder by its definition, float64 ``[E, in, out]``."""
    stored = tensors_of(folder)
    blocks, scales = stored[name + "_blocks"], stored[name + "_scales"]
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = magnitudes[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    return (values * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2).transpose(1, 2)


# ---- known bad states, each made by its mistake


def halves_taken(weight: Tensor) -> Tensor:
    """What comes back if Megatron's gates and ups were taken to alternate already."""
    return weight.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def alternating_taken(weight: Tensor) -> Tensor:
    return weight.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


STATES: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "transposed": ("transposed down_proj", DOWN, lambda t: t.transpose(1, 2)),
    "halves": ("gate and up not de-interleaved", GATE_UP, halves_taken),
    "alternating": ("gate and up de-interleaved once too often", GATE_UP, alternating_taken),
    "swapped": (
        "gate and up swapped",
        GATE_UP,
        lambda t: t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
    ),
    "bias": ("gate and up not de-interleaved", f"{GATE_UP}_bias", halves_taken),
    "zero sinks": ("zero sinks", SINKS, torch.zeros_like),
}


@pytest.mark.parametrize("form", ["hf", "megatron", "both"])
@pytest.mark.parametrize("kind", STATES)
def test_a_known_bad_state_of_a_tensor(
    kind: str, form: str, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    state, name, change = STATES[kind]
    good = originals["bf16-square"]
    bad = damaged(good, tmp_path / "bad", name, change)
    if form in ("megatron", "both"):
        import_checkpoint(bad, tmp_path / "bad-mg")
        bad = tmp_path / "bad-mg"
    if form == "both":
        import_checkpoint(good, tmp_path / "good-mg")
        good = tmp_path / "good-mg"
    done = invoke("verify", good, bad)
    assert done.returncode == MISMATCH
    assert state in done.stdout, done.stdout
    found = facts(invoke("verify", good, bad, "--json"))
    named = [f for f in found["findings"] if state in f["what"]]
    assert [f["where"] for f in named] == [name]
    assert {f["where"] for f in found["findings"]} == {name}
    assert all(f["remedy"] for f in named)
    assert "--tolerance" not in done.stdout


def test_missing_sinks(originals: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    tensors = tensors_of(originals["bf16"])
    del tensors[SINKS]
    bad = put(tmp_path / "bad", originals["bf16"], tensors)
    for command in (["verify", bad], ["verify", originals["bf16"], bad]):
        done = invoke(*command)
        assert done.returncode == MISMATCH
        assert f"{SINKS}: missing sinks" in done.stdout


@pytest.mark.parametrize("side", ["hf", "run_config"])
@pytest.mark.parametrize(
    ("state", "hf_change", "fields"),
    [
        ("YaRN constants lost", "rope", {"yarn_rotary_scaling_factor": 1.0}),
        ("sliding window lost", "window", {"window_size": None}),
    ],
)
def test_what_the_config_lost(
    side: str,
    state: str,
    hf_change: str,
    fields: dict[str, Any],
    originals: dict[str, Path],
    imported: Path,
    tmp_path: Path,
    invoke: Run,
) -> None:
    good = originals["bf16"]
    if side == "hf":
        bad = Path(shutil.copytree(good, tmp_path / "bad"))
        config = json.loads((bad / "config.json").read_bytes())
        if hf_change == "rope":
            for key in ("rope_scaling", "rope_parameters"):
                if isinstance(config.get(key), dict):
                    config[key] |= {"factor": 8.0}
        else:
            config["layer_types"] = ["full_attention"] * len(config["layer_types"])
        (bad / "config.json").write_text(json.dumps(config))
    else:
        bad = Path(shutil.copytree(imported, tmp_path / "bad"))
        edit_run_config(bad, lambda model: model.update(fields))
    done = invoke("verify", good, bad)
    assert done.returncode == MISMATCH
    assert state in done.stdout, done.stdout + done.stderr


def test_yarn_gone_altogether(originals: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    bad = Path(shutil.copytree(originals["bf16"], tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_bytes())
    for key in ("rope_scaling", "rope_parameters"):
        config.pop(key, None)
    (bad / "config.json").write_text(json.dumps(config))
    for command in (["verify", bad], ["verify", originals["bf16"], bad]):
        done = invoke(*command)
        assert done.returncode == MISMATCH
        assert "YaRN constants lost" in done.stdout


def change_tensors(folder: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Of a Megatron checkpoint, by torch's own readers and writers."""
    for path in folder.glob("iter_*/mp_rank_*/*.pt"):
        stored = torch.load(path, weights_only=False)
        model = stored["model"]
        model |= {name: change(model[name]).contiguous() for name in model if part in name}
        torch.save(stored, path)
    for path in folder.glob("iter_*/.metadata"):
        reader = dcp.FileSystemReader(path.parent)
        state = {
            name: torch.empty(found.size, dtype=found.properties.dtype)
            for name, found in reader.read_metadata().state_dict_metadata.items()
            if hasattr(found, "size")
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a single process
            dcp.load(state, storage_reader=reader, no_dist=True)
            state |= {name: change(state[name]).contiguous() for name in state if part in name}
            dcp.save(state, storage_writer=dcp.FileSystemWriter(path.parent), no_dist=True)


@pytest.mark.parametrize("form", ["hf", "torch_dist", "torch"])
@pytest.mark.parametrize("name", ["down_proj", "gate_up_proj"])
def test_a_transposed_matrix_that_is_not_square(
    name: str,
    form: str,
    originals: dict[str, Path],
    forms: dict[str, Path],
    legacy: Path,
    tmp_path: Path,
    invoke: Run,
) -> None:
    if form == "hf":
        whole = DOWN if name == "down_proj" else GATE_UP
        bad = damaged(originals["bf16"], tmp_path / "bad", whole, lambda t: t.transpose(1, 2))
    else:
        bad = without_manifest({**forms, "torch": legacy}[form], tmp_path / "bad")
        module = "linear_fc2.weight" if name == "down_proj" else "linear_fc1.weight"
        change_tensors(bad, module, lambda t: t.transpose(-1, -2))
    for command in (["verify", bad], ["verify", originals["bf16"], bad]):
        done = invoke(*command)
        assert done.returncode == MISMATCH
        assert f"transposed {name}: " in done.stdout, done.stdout


@pytest.mark.parametrize("kind", ["transposed", "halves", "swapped"])
def test_a_known_bad_state_that_was_quantized_since(
    kind: str, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """Rounding leaves a tenth of what the mistake changed."""
    state, name, change = STATES[kind]
    good = originals["bf16-square"]
    noise = torch.Generator().manual_seed(9)
    normal = torch.randn(tensors_of(good)[name].shape, generator=noise).bfloat16()
    sound = damaged(good, tmp_path / "sound", name, lambda _: normal)
    bad = damaged(good, tmp_path / "bad", name, lambda _: change(normal))
    for folder in (sound, bad):
        command = ["quantize", "--hf-model", folder, "--hf-path", f"{folder}-mxfp4"]
        assert invoke(*command).returncode == 0
    found = facts(invoke("verify", sound, f"{bad}-mxfp4", "--json"))
    assert [f["where"] for f in found["findings"] if state in f["what"]] == [name]
    done = invoke("verify", sound, f"{sound}-mxfp4", "--tolerance", "0.9")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("side", ["hf", "torch_dist"])
@pytest.mark.parametrize("mistake", ["hf", "torch_dist"])
def test_a_transposed_square_gate_up(
    mistake: str, side: str, write_tiny: Any, tmp_path: Path, invoke: Run
) -> None:
    """Turned where gates and ups alternate, or where they stand apart."""
    good = write_tiny(tmp_path / "hf", hidden_size=64, intermediate_size=32)
    import_checkpoint(good, tmp_path / "torch_dist")
    if mistake == "hf":
        bad = damaged(good, tmp_path / "bad", GATE_UP, lambda t: t.transpose(1, 2))
    else:
        bad = without_manifest(tmp_path / "torch_dist", tmp_path / "bad")
        change_tensors(bad, "linear_fc1.weight", lambda t: t.transpose(-1, -2))
    found = facts(invoke("verify", tmp_path / side, bad, "--json"))
    named = {f["where"] for f in found["findings"] if "transposed gate_up_proj" in f["what"]}
    assert GATE_UP in named


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("YaRN constants lost", {"rope_scaling": None, "rope_parameters": None}),
        ("sliding window lost", {"layer_types": ["full_attention"] * 3}),
    ],
)
def test_a_config_that_lost_something_by_itself(
    state: str, changes: dict[str, Any], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    bad = Path(shutil.copytree(originals["bf16"], tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_bytes())
    config |= {name: value for name, value in changes.items() if name in config}
    (bad / "config.json").write_text(json.dumps(config))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert state in done.stdout, done.stdout


LOST = [  # of Megatron's own config, and what a loader takes then
    ("YaRN constants lost", "rotary_base"),
    ("YaRN constants lost", "position_embedding_type"),
    ("YaRN constants lost", "yarn_beta_fast"),
    ("sinks switched off", "softmax_type"),
    ("sliding window lost", "window_size"),
    ("another model", "activation_func"),
    ("another model", "activation_func_clamp_value"),
    ("another model", "glu_linear_offset"),
    ("another model", "gated_linear_unit"),
    ("another model", "normalization"),
    ("another model", "moe_router_topk"),
    ("another model", "num_query_groups"),
    ("another model", "share_embeddings_and_output_weights"),
]


@pytest.mark.parametrize(("state", "field"), LOST)
def test_a_field_that_a_copy_of_the_config_lacks(
    state: str, field: str, imported: Path, tmp_path: Path, invoke: Run
) -> None:
    bad = without_manifest(imported, tmp_path / "bad")
    edit_run_config(bad, lambda model: model.pop(field))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert f"(run_config.yaml): {state}: {field} is missing" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "LayerNorm"),
        ("add_bias_linear", False),
        ("moe_router_pre_softmax", True),
        ("rotary_percent", 0.5),
        ("vocab_size", 4096),
    ],
)
def test_a_wrong_field_of_a_copy(
    field: str, value: object, imported: Path, tmp_path: Path, invoke: Run
) -> None:
    bad = without_manifest(imported, tmp_path / "bad")
    edit_run_config(bad, lambda model: model.update({field: value}))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert f"{field} is {value!r}, not " in done.stdout, done.stdout


def test_a_copy_of_the_config_that_says_the_same_in_other_words(
    originals: dict[str, Path], imported: Path, tmp_path: Path, invoke: Run
) -> None:
    """What a loader's defaults are right for, a list where a number would do, a trainer's length."""
    good = without_manifest(imported, tmp_path / "good")

    def reworded(model: dict[str, Any]) -> None:
        for field in ("add_bias_linear", "moe_router_pre_softmax", "rotary_percent", "vocab_size"):
            del model[field]
        model |= {"window_attn_skip_freq": [1, 0, 1], "seq_length": 4096}
        model |= {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}

    edit_run_config(good, reworded)
    found = facts(invoke("verify", originals["bf16"], good, "--json"))
    assert [(f["severity"], f["what"]) for f in found["findings"]] == [
        ("warning", "seq_length is 4096, not 131072")
    ]


def test_args_as_megatron_lm_has_them(imported: Path, tmp_path: Path, invoke: Run) -> None:
    """Without the fields for which it has other names, and with those."""
    good = without_manifest(imported, tmp_path / "good")
    (path,) = good.glob("iter_*/common.pt")
    stored = torch.load(path, weights_only=False)
    args = vars(stored["args"])
    for field in ("gated_linear_unit", "layernorm_epsilon", "num_moe_experts", "yarn_mscale"):
        del args[field]
    del args["share_embeddings_and_output_weights"], args["yarn_rotary_scaling_factor"]
    args |= {"mscale": 1.0, "mscale_all_dim": 0.0, "vocab_size": None, "seq_length": 131072}
    torch.save(stored, path)
    found = facts(invoke("verify", good, "--json"))
    assert [f["severity"] for f in found["findings"]] == ["info"]


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_args_that_lost_something(
    form: str, forms: dict[str, Path], legacy: Path, tmp_path: Path, invoke: Run
) -> None:
    """Beside a run config that is right, or in one rank's file of ten."""
    bad = without_manifest({**forms, "torch": legacy}[form], tmp_path / "bad")
    path = next(bad.glob("iter_*/common.pt" if form == "torch_dist" else "iter_*/*_01_003/*.pt"))
    stored = torch.load(path, weights_only=False)
    del stored["args"].rotary_base
    torch.save(stored, path)
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert f"{path.name}): YaRN constants lost: rotary_base is missing" in done.stdout, done.stdout
    assert "1 error" in done.stdout


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("sliding window lost", {"sliding_window": None}),
        ("sliding window lost", {"sliding_window": ...}),
        ("sliding window lost", {"sliding_window": 0}),
        ("sliding window lost", {"layer_types": None}),
        ("sliding window lost", {"layer_types": ...}),
        ("YaRN constants lost", {"rope_scaling": {"rope_type": "linear", "factor": 32.0}}),
        ("YaRN constants lost", {"rope_theta": ...}),
    ],
)
def test_a_config_that_cannot_be_read_for_what_it_lost(
    state: str, changes: dict[str, Any], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    bad = Path(shutil.copytree(originals["bf16"], tmp_path / "bad"))
    edit_config(bad / "config.json", **changes)
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert state in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("state", "fields"),
    [
        ("sliding window lost", {"window_size": None}),
        ("sliding window lost", {"window_size": [-1, -1]}),
        ("sliding window lost", {"window_attn_skip_freq": None}),
        ("YaRN constants lost", {"rotary_base": ...}),
    ],
)
def test_the_only_copy_of_the_config(
    state: str, fields: dict[str, Any], imported: Path, tmp_path: Path, invoke: Run
) -> None:
    bad = without_manifest(imported, tmp_path / "bad")
    (iteration,) = bad.glob("iter_*")
    (iteration / "huggingface/config.json").unlink()
    (iteration / "common.pt").unlink()
    edit_run_config(
        bad,
        lambda model: [
            model.pop(k) if v is ... else model.update({k: v}) for k, v in fields.items()
        ],
    )
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert state in done.stdout, done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000.0},
        {"sliding_window": 131072},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
)
def test_unusual_constants_are_told(
    changes: dict[str, Any], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """Nothing is there to hold them against, and they may be meant."""
    odd = Path(shutil.copytree(originals["bf16"], tmp_path / "odd"))
    edit_config(odd / "config.json", **changes)
    done = invoke("verify", odd)
    assert done.returncode == 0
    assert "not the constants of the published models" in done.stdout
    assert "published" not in invoke("verify", originals["bf16"]).stdout


def test_a_flipped_bit_that_hides_the_architecture(
    imported: Path, tmp_path: Path, invoke: Run
) -> None:
    """What cannot be opened does not keep the manifest's finding back."""
    bad = Path(shutil.copytree(imported, tmp_path / "bad"))
    (path,) = bad.glob("iter_*/huggingface/config.json")
    path.write_bytes(path.read_bytes().replace(b"GptOss", b"gptOss"))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert "huggingface/config.json: is damaged" in done.stdout
    (bad / "manifest.json").unlink()
    assert invoke("verify", bad).returncode == 1  # nothing was found out


def test_a_damaged_copy_of_the_config(forms: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    bad = Path(shutil.copytree(forms["torch_dist"], tmp_path / "bad"))
    (path,) = bad.glob("iter_*/common.pt")
    path.write_bytes(b"junk")
    for command in (["verify", bad], ["verify", forms["mxfp4"], bad]):
        done = invoke(*command)
        assert done.returncode == MISMATCH, done.stderr
        assert "common.pt" in done.stdout


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 150}, {"num_local_experts": 7}, {"hidden_size": 96}]
)
@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_models_of_different_sizes(
    form: str,
    sizes: dict[str, int],
    originals: dict[str, Path],
    write_tiny: Any,
    tmp_path: Path,
    invoke: Run,
) -> None:
    other = write_tiny(tmp_path / "other", **sizes)
    if form == "megatron":
        import_checkpoint(other, tmp_path / "other-mg")
        other = tmp_path / "other-mg"
    (size,) = sizes.values()
    for one, two in ((originals["bf16"], other), (other, originals["bf16"])):
        found = facts(invoke("verify", one, two, "--json"))
        named = {f["where"] for f in found["findings"] if f["what"].startswith("has shape [")}
        assert named
        assert all(str(size) in f["what"] for f in found["findings"])
        assert named.isdisjoint(tensor["name"] for tensor in found["tensors"])


def test_ghost_index_keys(originals: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    bad = put(tmp_path / "bad", originals["bf16"], tensors_of(originals["bf16"]))
    index = json.loads((bad / INDEX).read_bytes())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.mlp.experts.gate_up_proj_blocks"] = file
    (bad / INDEX).write_text(json.dumps(index))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert "ghost index keys: model.layers.0.mlp.experts.gate_up_proj_blocks" in done.stdout
    index["weight_map"]["rotary_emb.inv_freq"] = "model-00009-of-00009.safetensors"
    (bad / INDEX).write_text(json.dumps(index))
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert "ghost index keys: model-00009-of-00009.safetensors" in done.stdout


def test_padding_that_is_not_zero(legacy: Path, tmp_path: Path, invoke: Run) -> None:
    bad = Path(shutil.copytree(legacy, tmp_path / "bad"))
    for path in bad.glob("iter_*/mp_rank_01*/model_optim_rng.pt"):
        stored = torch.load(path, weights_only=False)
        stored["model"]["output_layer.weight"][-1, 3] = 0.25
        torch.save(stored, path)
    done = invoke("verify", bad)
    assert done.returncode == MISMATCH
    assert "vocabulary padding that is not zero: 1 of the" in done.stdout
    assert "output_layer.weight" in done.stdout


def test_values_that_are_not_finite(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    def spoil(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed.view(-1)[7] = math.nan
        return changed

    bad = damaged(originals["bf16"], tmp_path / "bad", DOWN, spoil)
    found = facts(invoke("verify", bad, "--values", "--json"))
    named = [(f["where"], f["severity"]) for f in found["findings"] if f["severity"] != "info"]
    assert named == [(DOWN, "error")]
    count = f"1 of {tensors_of(bad)[DOWN].numel():,} values"
    found = facts(invoke("verify", originals["bf16"], bad, "--tolerance", "0.5", "--json"))
    assert [(f["where"], f["severity"], f["what"]) for f in found["findings"]] == [
        (DOWN, "error", f"NaN or infinite in B and finite in A: {count}")
    ]
    found = facts(invoke("verify", bad, bad, "--json"))
    assert [(f["where"], f["severity"], f["what"]) for f in found["findings"]] == [
        (DOWN, "warning", f"NaN or infinite, in both alike: {count}")
    ]


@pytest.mark.parametrize("form", ["hf", "torch_dist"])
def test_values_that_a_codec_has_codes_for(
    form: str, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """A block of NaN travels by design: an import keeps its bytes for the export."""
    name = f"{DOWN}_scales"
    odd = damaged(
        originals["mxfp4"], tmp_path / "hf", name, lambda t: t.index_fill(2, torch.tensor([0]), 255)
    )
    import_checkpoint(odd, tmp_path / "torch_dist")
    found = facts(invoke("verify", tmp_path / form, "--values", "--json"))
    named = [(f["where"], f["severity"]) for f in found["findings"] if f["severity"] != "info"]
    assert named == [(DOWN, "warning")]


def test_figures_of_logits_that_are_not_defined() -> None:
    from gptoss_plugins.verify.checking import plain
    from gptoss_plugins.verify.logits import compare_logits

    found = compare_logits(torch.ones(3, 5), torch.full((3, 5), math.nan))
    assert json.loads(json.dumps(plain(found), allow_nan=False))["relative_error"] is None


def test_no_tolerance_but_a_number(originals: dict[str, Path], invoke: Run) -> None:
    for option in ("--tolerance", "--logits-tolerance"):
        done = invoke("verify", originals["bf16"], originals["bf16"], option, "nan")
        assert done.returncode == 2


@pytest.mark.parametrize("factor", [1.2266, 1.0301, 1.1])
def test_the_suggested_tolerance_suffices(
    factor: float, forms: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    bad = damaged(forms["float32"], tmp_path / "bad", DOWN, lambda t: t * factor)
    done = invoke("verify", forms["float32"], bad)
    allowed = re.search(r"--tolerance (\S+)", done.stdout)
    assert allowed
    assert invoke("verify", forms["float32"], bad, "--tolerance", allowed[1]).returncode == 0
    assert float(allowed[1]) < 1.1 * (factor - 1)


def test_zero_sinks(originals: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """They are told of the one that has them, and seen where nothing else is read."""
    good = originals["bf16"]
    bad = damaged(good, tmp_path / "bad", SINKS, torch.zeros_like)
    assert f"{SINKS}: zero sinks in A: " in invoke("verify", bad, good).stdout
    assert f"{SINKS}: zero sinks in B: " in invoke("verify", good, bad).stdout
    import_checkpoint(bad, tmp_path / "mg")
    for folder in (bad, tmp_path / "mg"):
        done = invoke("verify", folder)
        assert done.returncode == MISMATCH
        assert f"{SINKS}: zero sinks: " in done.stdout
        assert invoke("verify", folder, "--headers").returncode == 0


def test_one_flipped_bit(forms: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    def flip(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed.view(torch.int16).view(-1)[-1] ^= 1
        return changed

    bad = damaged(forms["bf16"], tmp_path / "bad", GATE_UP, flip)
    found = facts(invoke("verify", forms["mxfp4"], bad, "--json"))
    (tensor,) = (t for t in found["tensors"] if t["equal"] < t["elements"])
    assert (tensor["name"], tensor["elements"] - tensor["equal"]) == (GATE_UP, 1)
    assert [f["where"] for f in found["findings"]] == [GATE_UP]


def test_a_folder_by_itself_is_held_against_its_manifest(
    forms: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    folder = Path(shutil.copytree(forms["torch_dist"], tmp_path / "mg"))
    for place in (folder, next(folder.glob("iter_*"))):
        done = invoke("verify", place)
        assert done.returncode == 0, done.stdout
        assert "files are as they were written" in done.stdout
    path = min(folder.glob("iter_*/__1_0.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    found = facts(invoke("verify", folder, "--json"))
    (finding,) = (f for f in found["findings"] if f["severity"] == "error")
    assert finding["where"].endswith(path.name)
    assert "decoder.layers" in finding["what"]
    assert invoke("verify", folder, "--headers").returncode == 0


@pytest.mark.parametrize("pair", [("mxfp4", "torch_dist"), ("torch_dist", "bf16")])
def test_logits(pair: tuple[str, str], forms: dict[str, Path], invoke: Run) -> None:
    """Longer than the sliding window of 128; transformers on one side, megatron-core on the other."""
    one, two = (forms[name] for name in pair)
    found = facts(invoke("verify", one, two, "--logits", "--prompt-length", "140", "--json"))
    logits = found["logits"]
    assert logits["positions"] == len(logits["relative_error_by_position"]) == 140
    assert 0 < logits["relative_error"] < 1e-5
    assert logits["argmax_agreement"] == 1
    assert abs(logits["kl_mean"]) < 1e-9


@pytest.mark.slow
def test_logits_of_another_model(forms: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """The sinks of one layer reversed: values differ, and so do the logits."""
    bad = damaged(forms["bf16"], tmp_path / "bad", SINKS, lambda t: t.flip(0))
    command = ["verify", forms["torch_dist"], bad, "--logits", "--prompt-length", "140"]
    found = facts(invoke(*command, "--tolerance", "10", "--json"))
    assert [f["where"] for f in found["findings"]] == ["logits"]
    assert found["logits"]["relative_error"] > found["logits"]["limit"]


def test_by_several_processes(
    forms: dict[str, Path], tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads its share, one tells the result, which is that of a single process."""
    bad = damaged(forms["bf16"], tmp_path / "bad", SINKS, torch.zeros_like)
    monkeypatch.chdir(tmp_path)
    command = ["verify", forms["torch_dist"], bad, "--json"]
    alone = facts(invoke(*command))
    ranks = [2, 0, 1]
    done = [invoke(*command, env={"RANK": str(n), "WORLD_SIZE": "3"}) for n in ranks]
    assert [run.returncode for run in done] == [0, 0, MISMATCH]
    assert [run.stdout for run in done[:2]] == ["", ""]
    found = facts(done[2])
    assert {**found, "seconds": 0} == {**alone, "seconds": 0}
    assert not list(tmp_path.glob(".gptoss-verify-*"))


def test_what_is_no_checkpoint(originals: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "nothing", "no/such", tmp_path / "empty"):
        done = invoke("verify", originals["bf16"], name, env={"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 1, done.stdout
        assert done.stderr.startswith("error: ")
    done = invoke("verify")
    assert done.returncode == 2


def test_the_page(forms: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Every tensor has a cell, what differs is coloured, names are escaped, nothing is fetched."""
    bad = damaged(forms["bf16"], tmp_path / "<bad>", DOWN, lambda t: t * 2)
    page = tmp_path / "page.html"
    done = invoke("verify", forms["mxfp4"], bad, "--html", page)
    assert done.returncode == MISMATCH
    text = page.read_text()
    assert "<bad>" not in text
    assert "&lt;bad&gt;" in text
    titles = re.findall(r"class=cell style='background:(\S+)' title='([^']*): (\S+)'", text)
    cells = {name: (color, told) for color, name, told in titles}
    assert cells.keys() == tensors_of(forms["bf16"]).keys()
    different = {name for name, (color, told) in cells.items() if told != "equal"}
    assert different == {DOWN}
    assert cells[DOWN][1] == "1"
    assert len({color for color, _ in cells.values()}) == 2
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
