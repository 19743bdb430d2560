"""``gptoss-convert adapter`` as strangers use it: half adapters, other models, damaged folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "support"))
from adapters import tensors, with_adapter
from tiny_gptoss import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about each other

Run = Callable[..., Any]
MODEL = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, an adapter in both forms, and other models."""
    from click.testing import CliRunner

    from gptoss_convert.cli import main

    folder = tmp_path_factory.mktemp("made")
    found = {name: folder / name for name in ("hf", "peft", "megatron", "shallow", "wide", "few")}
    tiny_model(num_hidden_layers=3).save_pretrained(found["hf"])
    tiny_model(num_hidden_layers=2).save_pretrained(found["shallow"])
    tiny_model(num_hidden_layers=3, hidden_size=52).save_pretrained(found["wide"])
    tiny_model(num_hidden_layers=3, num_local_experts=6).save_pretrained(found["few"])
    with_adapter(tiny_model(num_hidden_layers=3)).save_pretrained(found["peft"])
    words = ["adapter", "import", "--adapter", found["peft"], "--hf-model", found["hf"]]
    done = CliRunner().invoke(main, [*map(str, words), "--output", str(found["megatron"])])
    assert done.exit_code == 0, done.output
    return found


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy with some fields of its config changed."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def rewritten(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy with some tensors changed."""
    from safetensors.torch import save_file

    shutil.copytree(folder, target)
    found = tensors(target)
    change(found)
    save_file(found, target / "adapter_model.safetensors", {"format": "pt"})
    return target


Q = f"{MODEL}.1.self_attn.q_proj.lora_"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "half": (lambda t: t.pop(f"{Q}B.weight"), "half an adapter"),
    "the other half": (lambda t: t.pop(f"{MODEL}.2.mlp.experts.lora_A.weight"), "half an adapter"),
    "a rank of B": (lambda t: t.update({f"{Q}B.weight": torch.ones(140, 4)}), "[140, 4]"),
    "both halves of a module": (
        lambda t: [t.pop(name) for name in [*t] if ".k_proj." in name],
        "layers.0.self_attn.k_proj.lora_A.weight: is missing",
    ),
    "names of no PEFT": (
        lambda t: [t.update({n.replace(".weight", ".default.weight"): t.pop(n)}) for n in [*t]],
        "is no name that PEFT gives a tensor",
    ),
    "a model without a head": (
        lambda t: [t.update({n.replace("model.model.", "model.", 1): t.pop(n)}) for n in [*t]],
        "that can be model.layers.N.self_attn.q_proj",
    ),
    "a rank of A": (lambda t: t.update({f"{Q}A.weight": torch.ones(2, 48)}), "rank of 3"),
    "another target": (
        lambda t: t.update(
            {f"base_model.model.lm_head.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
        ),
        "lm_head.lora_A.weight: adapts what cannot be carried over",
    ),
    "a missing layer": (
        lambda t: [t.pop(f"{MODEL}.0.self_attn.o_proj.lora_{f}.weight") for f in "AB"],
        "layers.0.self_attn.o_proj.lora_A.weight: is missing",
    ),
    "NaN": (lambda t: t[f"{Q}B.weight"].fill_(float("nan")), "holds NaN"),
    "beyond float32": (
        lambda t: t.update({f"{Q}A.weight": t[f"{Q}A.weight"].double() * 1e99}),
        "beyond float32",
    ),
    "whole numbers": (lambda t: t.update({f"{Q}A.weight": torch.ones(3, 48).int()}), "is I32"),
    "a layer of too many digits": (
        lambda t: t.update(
            {
                f"{MODEL}.{'9' * 5000}.self_attn.q_proj.lora_{f}.weight": torch.ones(2, 2)
                for f in "AB"
            }
        ),
        "adapts what cannot be carried over",
    ),
    "nothing": (lambda t: t.clear(), "no tensors"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "IA3": ({"peft_type": "IA3"}, "IA3"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "no rank": ({"r": None}, "r is None"),
    "endless pattern": ({"rank_pattern": {"(a+)+$": 2}}, "no name of a module"),
    "experts not named": ({"target_parameters": None}, "target_parameters"),
    "a long one": ({"auto_mapping": "x" * (1 << 21)}, "takes 2,09"),
    "a parameter not named": ({"target_parameters": ["mlp.experts.down_proj"]}, "does not name"),
    "modules not named": ({"target_modules": ["q_proj", "o_proj"]}, "target_modules, exclude_mod"),
    "modules left out": ({"exclude_modules": ["1.self_attn.q_proj"]}, "exclude_modules"),
    "layers left out": ({"layers_to_transform": [0, 2]}, "layers_to_transform"),
    "neither true nor false": ({"use_rslora": "no"}, "use_rslora is 'no'"),
    "another rank": ({"r": 4}, "adapter_config.json tells another rank"),
}


def refused(done: Any, target: Path, text: str, code: int = 1) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}.incomplete*"))


@pytest.mark.parametrize("case", [*TENSORS, *CONFIGS])
def test_damaged_adapters(case: str, made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    bad = tmp_path / "bad"
    if case in TENSORS:
        change, text = TENSORS[case]
        rewritten(made["peft"], bad, change)
    else:
        fields, text = CONFIGS[case]
        changed(made["peft"], bad, **fields)
    words = ("--adapter", bad, "--hf-model", made["hf"])
    if case not in ("NaN", "beyond float32"):  # which a conversion carries
        done = invoke("adapter", "import", *words, "--output", tmp_path / "out")
        refused(done, tmp_path / "out", text)
    done = invoke("adapter", "merge", *words, "--hf-path", tmp_path / "out")
    refused(done, tmp_path / "out", text)


@pytest.mark.parametrize("form", ["peft", "megatron"])
@pytest.mark.parametrize(
    ("other", "text"),
    [("shallow", "2 layers"), ("wide", "[3, 52]"), ("few", "experts")],
)
def test_another_model(
    form: str, other: str, text: str, made: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    words = ("--adapter", made[form], "--hf-model", made[other], "--hf-path", tmp_path / "out")
    done = invoke("adapter", "merge", *words)
    if form == "megatron" and other == "wide":
        text = "52"
    refused(done, tmp_path / "out", text)


def test_wrong_words(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Each says what to do."""
    out = tmp_path / "out"
    base, ours = ("--hf-model", made["hf"]), ("--adapter", made["megatron"])
    cases: list[tuple[tuple[Any, ...], str, int]] = [
        (("import", *ours, *base, "--output", out), "adapter export takes it to the other", 2),
        (("export", "--adapter", made["peft"], *base, "--output", out), "adapter import", 2),
        (("export", "--adapter", made["peft"], "--output", out), "is an adapter and no model", 1),
        (("merge", "--adapter", made["hf"], *base, "--hf-path", out), "is no adapter", 1),
        (("merge", *ours, *base), "--hf-path", 2),
        (("merge", *ours, "--hf-path", out), "--hf-model", 2),
        (("merge", *base, "--hf-path", out), "--adapter", 2),
        (("merge", *ours, "--hf-model", made["peft"], "--hf-path", out), "is an adapter and no", 1),
        (("merge", *ours, *base, "--output", out, "--export-dtype", "mxfp4"), "--hf-path", 2),
        (("merge", *ours, *base, "--hf-path", made["peft"]), "is not empty", 1),
    ]
    for words, text, code in cases:
        done = invoke("adapter", *words)
        assert done.returncode == code, (words, done.stderr)
        assert text in done.stderr, (words, done.stderr)
        assert not out.exists()


def test_verify_and_inspect_an_adapter(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Alone: its bytes are held against the manifest, and half of one is found."""
    for form in ("peft", "megatron"):
        done = invoke("verify", made[form])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "is an adapter" in done.stdout
    place = shutil.copytree(made["megatron"], tmp_path / "bad")
    (part, *_) = sorted(place.glob("iter_*/*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    done = invoke("verify", place)
    assert done.returncode == 3
    assert part.name in done.stdout
    half = rewritten(made["peft"], tmp_path / "half", lambda t: t.pop(f"{Q}B.weight"))
    done = invoke("verify", half)
    assert done.returncode == 3
    assert "half an adapter" in done.stdout
    facts = json.loads(invoke("inspect", made["peft"], "--json").stdout)
    assert (facts["layout"]["rank"], facts["layout"]["alpha"]) == (3, 5)
    assert "with --adapter" in facts["problems"][0]


def test_a_folder_of_more(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """The adapter of a folder that holds its model, too, is found; that in a folder below is named."""
    shutil.copytree(made["peft"], tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(made["hf"] / name, tmp_path / "both")
    base = ("--hf-model", made["hf"])
    done = invoke(
        "adapter", "import", "--adapter", tmp_path / "both", *base, "--output", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(made["peft"], tmp_path / "named/mine")
    words = ("--adapter", tmp_path / "named", *base, "--output", tmp_path / "out")
    refused(invoke("adapter", "import", *words), tmp_path / "out", "you mean (mine)")
    (tmp_path / "named/mine/adapter_config.json").unlink()
    words = ("--adapter", tmp_path / "named/mine", *base, "--output", tmp_path / "out")
    refused(
        invoke("adapter", "import", *words), tmp_path / "out", "adapter_config.json: is missing"
    )


def test_sums_beyond_float32(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    def grow(tensors: dict[str, Any]) -> None:
        tensors |= {name: t * 1e22 for name, t in tensors.items() if "o_proj" in name}

    huge = rewritten(made["peft"], tmp_path / "huge", grow)
    done = invoke(
        "adapter",
        "merge",
        "--adapter",
        huge,
        "--hf-model",
        made["hf"],
        "--hf-path",
        tmp_path / "out",
    )
    refused(done, tmp_path / "out", "o_proj.weight: with the adapter it goes beyond float32")


def test_a_pickle_is_not_read(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    shutil.copytree(made["peft"], tmp_path / "bad")
    (tmp_path / "bad/adapter_model.safetensors").rename(tmp_path / "bad/adapter_model.bin")
    words = ("--adapter", tmp_path / "bad", "--hf-model", made["hf"], "--output", tmp_path / "out")
    refused(invoke("adapter", "import", *words), tmp_path / "out", "pickle")


def test_no_scale(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Megatron's form tells it in run_config.yaml; without it nothing is guessed."""
    shutil.copytree(made["megatron"], tmp_path / "bad")
    path = tmp_path / "bad/iter_0000000/run_config.yaml"
    for text, sentence in (
        (path.read_text().replace("peft.lora.LoRA", "peft.dora.DoRA"), "peft is DoRA"),
        (path.read_text().replace("peft:", "pfft:"), "is no run config"),
        (path.read_text().replace("alpha: 5", "alpha: -5"), "peft.alpha is -5"),
        (path.read_text().replace("alpha: 5", "alfa: 5"), "peft.alpha is None"),
        (path.read_text().replace("dim: 3", "dim: 3.5"), "peft.dim is 3.5"),
        (path.read_text().replace("dim: 3", "dim: 4"), "of rank 3, 9"),
        ("", "run_config.yaml"),
    ):
        path.write_text(text)
        words = ("--adapter", tmp_path / "bad", "--hf-model", made["hf"])
        done = invoke("adapter", "merge", *words, "--hf-path", tmp_path / "out")
        refused(done, tmp_path / "out", sentence)
        shutil.copy(made["megatron"] / "iter_0000000/run_config.yaml", path)


def test_an_adapter_is_no_model(made: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Commands for models say so."""
    out = tmp_path / "out"
    done = invoke("import", "--hf-model", made["peft"], "--megatron-path", out)
    refused(done, out, "is an adapter and no model")
    done = invoke("export", "--megatron-path", made["megatron"], "--hf-path", out)
    refused(done, out, "is the checkpoint of an adapter")


def test_merged_into_bfloat16_and_mxfp4(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """What rounding costs is told and right; what the adapter does not touch keeps its bytes."""
    from safetensors.torch import load_file

    base = originals["mxfp4"]
    config = json.loads((base / "config.json").read_text())
    model = {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "num_local_experts": config["num_local_experts"],
        "num_hidden_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
    }
    adapter = with_adapter(
        tiny_model(**model), target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    adapter.save_pretrained(tmp_path / "peft")
    exact = dict(adapter.named_modules())
    plain = tmp_path / "plain"
    assert invoke("dequantize", "--hf-model", base, "--hf-path", plain).returncode == 0
    before = {}
    for path in plain.glob("*.safetensors"):
        before |= load_file(path)
    words = ("--adapter", tmp_path / "peft", "--hf-model", base, "--json")
    done = invoke("adapter", "merge", *words, "--hf-path", tmp_path / "bf16")
    assert done.returncode == 0, done.stderr
    told = {t["name"]: t for t in json.loads(done.stdout)["rounding"]["tensors"]}
    after = load_file(tmp_path / "bf16/model.safetensors")
    for name, weight in before.items():
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        if last not in ("q_proj", "down_proj"):
            assert torch.equal(after[name], weight)
            assert told.get(name, {"requantized": 0})["requantized"] == 0
            continue
        found = exact[f"base_model.model.{owner}" + (".q_proj" if last == "q_proj" else "")]
        wanted = weight.double() + found.get_delta_weight("default").double()
        error = after[name].double() - wanted
        assert error.abs().max() <= wanted.abs().max() * 2**-8
        assert told[name]["max_error"] == pytest.approx(error.abs().max().item(), rel=1e-3)
        assert told[name]["rms_error"] == pytest.approx(
            error.square().mean().sqrt().item(), rel=1e-3
        )
        assert 0 < told[name]["requantized"] <= weight.numel()
    done = invoke(
        "adapter", "merge", *words, "--hf-path", tmp_path / "q", "--export-dtype", "mxfp4"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    lost = {t["name"]: t["requantized"] for t in facts["encoding"]["tensors"]}
    stored, original = load_file(tmp_path / "q/model.safetensors"), {}
    for path in base.glob("*.safetensors"):
        original |= load_file(path)
    assert stored.keys() == original.keys()
    for name, weight in original.items():
        if "gate_up_proj" in name:
            assert torch.equal(stored[name], weight)
    assert all((count > 0) == name.endswith("down_proj") for name, count in lost.items())
    assert {
        t["name"].rpartition(".q_")[2] for t in facts["rounding"]["tensors"] if t["requantized"]
    } == {"proj.weight"}
