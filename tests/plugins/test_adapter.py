"""Adapters between PEFT and Megatron, and into weights: PEFT itself is the judge."""

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

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from adapters import EXPERTS, alike, load_onto, logits, tensors, with_adapter
from tiny_gptoss import megatron_tensors, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about each other

Run = Callable[..., Any]
LAYERS = 3
SIZES: dict[str, dict[str, int]] = {"": {}, "square": {"intermediate_size": 48}}
ONE_LAYER = [f"1.{name}" for name in EXPERTS]  # as OpenAI's cookbook adapts some layers' experts
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "target_parameters": None},
    "o": {"target_modules": ["o_proj"], "target_parameters": None},
    "down": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "gate and up": {"target_modules": ["k_proj"], "target_parameters": EXPERTS[:1]},
    "ranks": {
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 4, "o_proj": 1, EXPERTS[1]: 2},
        "alpha_pattern": {"q_proj": 8, "o_proj": 2, EXPERTS[1]: 4},
    },
    "stabilized": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"o_proj": 20, EXPERTS[0]: 10}},
    "experts of a layer": {"target_parameters": ONE_LAYER},
    "a layer": {"target_parameters": None, "layers_to_transform": [1]},
    "but one": {"target_parameters": None, "exclude_modules": ["1.self_attn.k_proj"]},
    "another rank on a layer": {
        "rank_pattern": {"0.self_attn.q_proj": 2, "2.self_attn.o_proj": 5, "1." + EXPERTS[0]: 4}
    },
    "one of two on some layers": {"target_parameters": [EXPERTS[0], "1." + EXPERTS[1]]},
}
CASES = [*(("", kind) for kind in KINDS), ("square", "all"), ("square", "down")]
SAME_FILE = ("all", "q and v", "o", "down", "gate and up", "ranks", "stabilized")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Models, as transformers saves them."""
    found = {}
    for name, sizes in SIZES.items():
        folder = tmp_path_factory.mktemp("base") / "hf"
        every = {"num_hidden_layers": LAYERS, **sizes}
        tiny_model(**every).save_pretrained(folder)
        found[name] = {"sizes": every, "hf": folder}
    return found


@pytest.fixture
def base(bases: dict[str, Any]) -> dict[str, Any]:
    return bases[""]


def said(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def adapted(base: dict[str, Any], folder: Path, **options: Any) -> tuple[Any, Tensor]:
    """PEFT's model, saved, and its logits."""
    model = with_adapter(tiny_model(**base["sizes"]), **options)
    model.save_pretrained(folder)
    return model, logits(model)


def imported(invoke: Run, base: dict[str, Any], folder: Path, target: Path) -> dict[str, Any]:
    where = ("--hf-model", base["hf"], "--output", target, "--json", "--no-progress")
    return said(invoke("adapter", "import", "--adapter", folder, *where))


def exported(invoke: Run, folder: Path, target: Path) -> dict[str, Any]:
    return said(invoke("adapter", "export", "--adapter", folder, "--output", target, "--json"))


@pytest.mark.parametrize(
    ("size", "kind"),
    [pytest.param(*one, marks=pytest.mark.slow if n > 1 else ()) for n, one in enumerate(CASES)],
)
def test_as_peft_has_it(
    size: str, kind: str, bases: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """What comes back from Megatron computes what PEFT computed, and is the same file where it can be;
    so do merged models, of either form of the adapter.
    """
    from transformers import GptOssForCausalLM

    base = bases[size]
    _, want = adapted(base, tmp_path / "peft", **KINDS[kind])
    assert (logits(tiny_model(**base["sizes"])) - want).abs().max() > 0.01
    imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")
    exported(invoke, tmp_path / "megatron", tmp_path / "back")
    back = logits(load_onto(tiny_model(**base["sizes"]), tmp_path / "back"))
    assert (back - want).abs().max() < 1e-5
    if kind in SAME_FILE:
        before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    for form in ("peft", "megatron"):
        where = ("--hf-model", base["hf"], "--hf-path", tmp_path / f"merged {form}", "--json")
        said(invoke("adapter", "merge", "--adapter", tmp_path / form, *where))
        model = GptOssForCausalLM.from_pretrained(
            tmp_path / f"merged {form}", dtype=torch.float32, attn_implementation="eager"
        )
        assert (logits(model.eval()) - want).abs().max() < 1e-5


@pytest.mark.parametrize("size", ["", "square"])
def test_experts_the_other_way_round(
    size: str, bases: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """PEFT takes inputs for outputs where transformers does not tell it of GPT-OSS; what is exported
    is as it is where it does.
    """
    base = bases[size]
    model = tiny_model(**base["sizes"])
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    wrapped = with_adapter(model)
    for layer in model.model.layers:
        layer.mlp.experts.get_base_layer().is_transposed = True
    wrapped.save_pretrained(tmp_path / "peft")
    want = logits(wrapped)
    assert (logits(tiny_model(**base["sizes"])) - want).abs().max() > 0.01
    imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")
    exported(invoke, tmp_path / "megatron", tmp_path / "back")
    back = load_onto(tiny_model(**base["sizes"]), tmp_path / "back")
    assert (logits(back) - want).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_are_not_rounded(
    dtype: torch.dtype, base: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """B takes up what one scale for all does not; in half precision that would be far off."""
    from safetensors.torch import save_file

    adapted(base, tmp_path / "peft", **KINDS["alphas"] | {"rank_pattern": {"q_proj": 7}})
    half = {name: weight.to(dtype) for name, weight in tensors(tmp_path / "peft").items()}
    save_file(half, tmp_path / "peft/adapter_model.safetensors", {"format": "pt"})
    want = logits(load_onto(tiny_model(**base["sizes"]), tmp_path / "peft"))
    imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")
    exported(invoke, tmp_path / "megatron", tmp_path / "back")
    back = load_onto(tiny_model(**base["sizes"]), tmp_path / "back")
    assert (logits(back) - want).abs().max() < 1e-5


def test_megatrons_form(base: dict[str, Any], tmp_path: Path, invoke: Run) -> None:
    """Keys and shapes are Megatron-Bridge's; B A is PEFT's change of the weights, translated by a
    program of its own; torch's own reader reads it.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    model, _ = adapted(base, tmp_path / "peft")
    facts = imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")
    scale = facts["adapter"]["alpha"] / facts["adapter"]["rank"]
    config = model.config.to_dict()
    H, E, I = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    rows = q + 2 * config["num_key_value_heads"] * config["head_dim"]
    experts = "mlp.experts.experts."
    shapes = {
        "self_attention.linear_qkv": ((9, H), (rows, 9)),
        "self_attention.linear_proj": ((3, q), (H, 3)),
        experts + "linear_fc1": ((E, 3, H), (E, 2 * I, 3)),
        experts + "linear_fc2": ((E, 3, I), (E, H, 3)),
    }
    state = {
        f"decoder.layers.{name}.adapter.{factor}.weight": torch.empty(LAYERS, *shape)
        for name, both in shapes.items()
        for factor, shape in zip(("linear_in", "linear_out"), both, strict=True)
    }
    folder = tmp_path / "megatron/iter_0000000"
    assert FileSystemReader(folder).read_metadata().state_dict_metadata.keys() == state.keys()
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)

    original = dict(tiny_model(**base["sizes"]).state_dict())
    merged = model.merge_and_unload().state_dict()
    changes = {name: merged[name].double() - weight.double() for name, weight in original.items()}
    wanted = megatron_tensors(config, changes)
    for name in shapes:
        key = f"decoder.layers.{name}.adapter."
        a, b = (state[f"{key}{factor}.weight"].double() for factor in ("linear_in", "linear_out"))
        assert (scale * b @ a - wanted[f"decoder.layers.{name}.weight"]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["one A", "shared"])
def test_what_is_shared_stays_shared(
    kind: str, base: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    adapted(base, tmp_path / "peft")
    alike(tmp_path / "peft", kind)
    want = logits(load_onto(tiny_model(**base["sizes"]), tmp_path / "peft"))
    targets = {
        target["linear"]: target
        for target in imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")["adapter"][
            "targets"
        ]
    }
    if kind == "one A":
        assert targets["linear_qkv"]["rank"] == 3
    assert targets["linear_fc1"]["shared"] is targets["linear_fc2"]["shared"] is (kind == "shared")
    exported(invoke, tmp_path / "megatron", tmp_path / "back")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    where = ("--hf-model", base["hf"], "--output", tmp_path / "merged", "--json")
    said(invoke("adapter", "merge", "--adapter", tmp_path / "megatron", *where))
    said(
        invoke(
            "export", "--megatron-path", tmp_path / "merged", "--hf-path", tmp_path / "hf", "--json"
        )
    )
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    assert (logits(model.eval()) - want).abs().max() < 1e-5


def test_an_untrained_adapter_changes_nothing(
    base: dict[str, Any], tmp_path: Path, invoke: Run, content: Any
) -> None:
    """B is zero, so nothing tells q, k and v apart; the base's bytes come back."""
    model = with_adapter(tiny_model(**base["sizes"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    model.save_pretrained(tmp_path / "peft")
    imported(invoke, base, tmp_path / "peft", tmp_path / "megatron")
    exported(invoke, tmp_path / "megatron", tmp_path / "back")
    back = load_onto(tiny_model(**base["sizes"]), tmp_path / "back")
    assert torch.equal(logits(back), logits(tiny_model(**base["sizes"])))
    where = ("--hf-model", base["hf"], "--hf-path", tmp_path / "merged", "--json")
    done = said(invoke("adapter", "merge", "--adapter", tmp_path / "back", *where))
    assert done["rounding"]["total"]["requantized"] == 0
    from safetensors.torch import load_file

    before, after = (load_file(p / "model.safetensors") for p in (base["hf"], tmp_path / "merged"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


@pytest.mark.parametrize("kind", ["all", "ranks"])
def test_one_rank_for_all(kind: str, base: dict[str, Any], tmp_path: Path, invoke: Run) -> None:
    """As Megatron-Bridge needs it; nothing changes, and the same files come back."""
    _, want = adapted(base, tmp_path / "peft", **KINDS[kind])
    where = ("--hf-model", base["hf"], "--output", tmp_path / "megatron", "--uniform-rank")
    said(invoke("adapter", "import", "--adapter", tmp_path / "peft", *where, "--json"))
    done = exported(invoke, tmp_path / "megatron", tmp_path / "back")
    rank = 9 if kind == "all" else 10
    assert {target["rank"] for target in done["adapter"]["targets"]} == {rank}
    assert done["adapter"]["rank"] == rank
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        logits(load_onto(tiny_model(**base["sizes"]), tmp_path / "back")) - want
    ).abs().max() < 1e-5


def test_every_way_of_merging_is_the_same(
    base: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """From and to either side, up to the last digit of float32."""
    adapted(base, tmp_path / "peft")
    megatron = ("--megatron-path", tmp_path / "megatron")
    assert invoke("import", "--hf-model", base["hf"], *megatron).returncode == 0
    ends = {
        "a": ("--hf-model", base["hf"], "--hf-path"),
        "b": ("--hf-model", base["hf"], "--output"),
        "c": (*megatron, "--hf-path"),
        "d": (*megatron, "--output"),
    }
    for name, end in ends.items():
        said(
            invoke(
                "adapter", "merge", "--adapter", tmp_path / "peft", *end, tmp_path / name, "--json"
            )
        )
    for name in "bcd":
        done = invoke("verify", tmp_path / "a", tmp_path / name, "--tolerance", 1e-7, "--json")
        assert done.returncode == 0, done.stdout
    shutil.rmtree(tmp_path / "a")
