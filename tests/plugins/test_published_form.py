"""What we write as MXFP4 is what the published model's loaders take: by transformers itself, and by
the rules of vLLM and llama.cpp on names, shapes, types, order and config.

The rules were read off their public sources and are said here in our own words:

* vLLM, ``vllm/model_executor/models/gpt_oss.py``: ``GptOssForCausalLM.hf_to_vllm_mapper``,
  ``GptOssModel.load_weights`` and ``_load_weights_mxfp4``; ``create_weights`` in
  ``vllm/model_executor/layers/quantization/mxfp4.py``.
* llama.cpp, ``conversion/gpt_oss.py`` (``convert_hf_to_gguf.py`` before): ``GptOssModel``, that is
  ``generate_extra_tensors``, ``repack_mxfp4``, ``transform_nibble_layout`` and ``modify_tensors``.
"""

from __future__ import annotations

import csv
import json
import math
import re
import runpy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert import TensorSpec
from gptoss_convert.convert import export_checkpoint, import_checkpoint
from gptoss_convert.encoding import Encoding
from gptoss_convert.plan import ConversionPlan, make_plan
from gptoss_convert.testing import write_hf_folder
from gptoss_plugins.gptoss import gptoss_convert_models
from gptoss_plugins.huggingface import sink
from gptoss_plugins.huggingface.sink import HuggingFaceSink, export_config
from gptoss_plugins.mxfp4 import gptoss_convert_codecs

(FAMILY,) = gptoss_convert_models()
(MXFP4,) = gptoss_convert_codecs()
PUBLISHED = Path(__file__).parent / "published"
SIZES = ["20b", "120b"]
Specs = Mapping[str, TensorSpec]
EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.")


def published(size: str) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    config = json.loads((PUBLISHED / f"config_{size}.json").read_text())
    with open(PUBLISHED / f"tensors_{size}.csv") as file:
        specs = {
            row["name"]: TensorSpec(tuple(map(int, row["shape"].split("x"))), row["dtype"])
            for row in csv.DictReader(file)
        }
    return config, specs


def megatron_specs(config: dict[str, Any], specs: Specs) -> dict[str, TensorSpec]:
    """What an import of those tensors writes."""
    plan = make_plan("import", specs, FAMILY, config, where="published", codec=MXFP4)
    return {o.name: o.spec for step in plan.steps for o in step.outputs}


def export_plan(size: str, *, was_bf16: bool = False) -> ConversionPlan:
    """The export of a released model as MXFP4; nothing is read or written."""
    config, specs = published(size)
    own = {k: v for k, v in config.items() if not (was_bf16 and k == "quantization_config")}
    mine = megatron_specs(config, specs)
    encoding = Encoding(MXFP4)
    return make_plan("export", mine, FAMILY, own, where="megatron", encoding=encoding)


def written(plan: ConversionPlan) -> dict[str, TensorSpec]:
    """Stored tensors in the order in which they stand in the files."""
    return {n: s for step in plan.steps for o in step.outputs for n, s in o.stored}


# ---- the published lists


@pytest.mark.parametrize("size", SIZES)
def test_the_released_tensors_to_the_last_one(size: str) -> None:
    config, specs = published(size)
    plan = export_plan(size)
    assert written(plan) == specs
    assert export_config(plan) == config
    assert plan.bytes_out == sum(spec.nbytes for spec in specs.values())
    assert export_config(export_plan(size, was_bf16=True)) == {
        **config,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("size", SIZES)
def test_shards_of_the_released_models(size: str) -> None:
    """A tensor is in one file; blocks and their scales are in the same one, the blocks first."""
    plan = export_plan(size)
    groups = HuggingFaceSink(Path("nowhere"), plan).groups
    assert len(groups) > {"20b": 2, "120b": 12}[size]
    names: list[str] = []
    for group in groups:
        here = [n for step in group.steps for o in step.outputs for n, _ in o.stored]
        for name in here:
            if name.endswith("_blocks"):
                assert here[here.index(name) + 1] == name.replace("_blocks", "_scales")
        assert group.nbytes <= sink.SHARD_BYTES
        names += here
    assert sorted(names) == sorted(published(size)[1])


# ---- vLLM


@dataclass(frozen=True)
class Parameter:
    """What vLLM allocates, in letters that a config gives numbers for."""

    shape: str
    dtype: str


VLLM_EXPERTS = {  # per layer, whatever the backend, before it pads
    "w13_weight": Parameter("E 2I H/2", "U8"),
    "w13_weight_scale": Parameter("E 2I H/32", "U8"),
    "w13_bias": Parameter("E 2I", "BF16"),
    "w2_weight": Parameter("E H I/2", "U8"),
    "w2_weight_scale": Parameter("E H I/32", "U8"),
    "w2_bias": Parameter("E H", "BF16"),
}
VLLM_SUFFIXES = {  # the checkpoint's ending -> the parameter's; the first that fits
    "gate_up_proj_blocks": "w13_weight",
    "down_proj_blocks": "w2_weight",
    "gate_up_proj_scales": "w13_weight_scale",
    "down_proj_scales": "w2_weight_scale",
    "gate_up_proj_bias": "w13_bias",
    "down_proj_bias": "w2_bias",
    "gate_up_proj": "w13_weight",
    "down_proj": "w2_weight",
}
# Everything else: the checkpoint's tensors, each of which must find its parameter.
OTHERS = {
    "model.embed_tokens.weight": "V H",
    "model.norm.weight": "H",
    "lm_head.weight": "V H",
    "model.layers.#.input_layernorm.weight": "H",
    "model.layers.#.post_attention_layernorm.weight": "H",
    "model.layers.#.self_attn.q_proj.weight": "ND H",
    "model.layers.#.self_attn.q_proj.bias": "ND",
    "model.layers.#.self_attn.k_proj.weight": "GD H",
    "model.layers.#.self_attn.k_proj.bias": "GD",
    "model.layers.#.self_attn.v_proj.weight": "GD H",
    "model.layers.#.self_attn.v_proj.bias": "GD",
    "model.layers.#.self_attn.o_proj.weight": "H ND",
    "model.layers.#.self_attn.o_proj.bias": "H",
    "model.layers.#.self_attn.sinks": "N",
    "model.layers.#.mlp.router.weight": "E H",
    "model.layers.#.mlp.router.bias": "E",
}


def numbers(config: Mapping[str, Any], letters: str) -> tuple[int, ...]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, head = config["num_attention_heads"], config["head_dim"]
    known = {
        "E": config["num_local_experts"], "V": config["vocab_size"], "N": heads,
        "ND": heads * head, "GD": config["num_key_value_heads"] * head,
        "H": hidden, "H/2": hidden // 2, "H/32": hidden // 32,
        "2I": 2 * inner, "I/2": inner // 2, "I/32": inner // 32,
    }  # fmt: skip
    return tuple(known[letter] for letter in letters.split())


def others(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("#", str(layer)): numbers(config, letters)
        for name, letters in OTHERS.items()
        for layer in range(config["num_hidden_layers"] if "#" in name else 1)
    }


def vllm_problems(config: Mapping[str, Any], specs: Specs) -> list[str]:
    """Why vLLM would not load this checkpoint, or not as MXFP4; empty if it would."""
    problems = []
    if config.get("quantization_config", {}).get("quant_method") != "mxfp4":
        problems.append("config: the experts would be taken for unquantized ones")
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    inner = config["intermediate_size"]
    loaded = set()
    rest = others(config)
    for name, spec in specs.items():
        if not (found := EXPERTS.match(name)):
            if rest.pop(name, None) != spec.shape:
                problems.append(f"{name}: has no parameter of its shape")
            if spec.dtype != "BF16":
                problems.append(f"{name}: is {spec.dtype}")
            continue
        suffix = next((s for s in VLLM_SUFFIXES if name.endswith(f".{s}")), None)
        if suffix is None:
            problems.append(f"{name}: is no part of the experts")
            continue
        wanted = VLLM_EXPERTS[VLLM_SUFFIXES[suffix]]
        shape = spec.shape
        if suffix.endswith("_blocks"):  # flattened to [E, 2I, -1] or to [E, -1, I/2]
            flat = (experts, 2 * inner) if "gate_up" in suffix else (experts,)
            last = () if "gate_up" in suffix else (inner // 2,)
            middle = spec.numel // math.prod((*flat, *last))
            shape = (*flat, middle, *last)
            if math.prod(shape) != spec.numel:
                problems.append(f"{name}: cannot be viewed as its parameter")
        if shape != numbers(config, wanted.shape) or spec.dtype != wanted.dtype:
            problems.append(f"{name}: is {spec}, viewed as {list(shape)}")
        loaded.add(found[0] + VLLM_SUFFIXES[suffix])
    wanted_names = {
        f"model.layers.{n}.mlp.experts.{p}" for n in range(layers) for p in VLLM_EXPERTS
    }
    problems += [f"{name}: was not loaded" for name in sorted(wanted_names - loaded)]
    problems += [f"{name}: was not loaded" for name in sorted(rest)]
    return problems


# ---- llama.cpp


def llama_cpp_problems(
    config: Mapping[str, Any], specs: Iterable[tuple[str, TensorSpec]]
) -> list[str]:
    """Why the conversion to GGUF would fail or write something else; ``specs`` in file order.

    It keeps the blocks it saw last and joins them with the next scales of that projection; both
    are uint8, ``[E, rows, K/32, 16]`` and ``[E, rows, K/32]``, and become 17 bytes a block. Gate
    and up are the even and the odd rows. Any tensor it does not know stops it.
    """
    problems = []
    if config["architectures"] != ["GptOssForCausalLM"]:
        problems.append("config: another architecture")
    if (config.get("quantization_config") or {}).get("quant_method") != "mxfp4":
        problems.append("config: would be taken for a model to dequantize")
    rest = others(config)
    last: dict[str, tuple[str, TensorSpec]] = {}
    repacked = set()
    for name, spec in specs:
        if not EXPERTS.match(name):
            if rest.pop(name, None) != spec.shape:
                problems.append(f"{name}: is unknown, or of another shape")
            continue
        projection = "gate_up" if "gate_up_proj" in name else "down"
        rows, width = ("2I", "H") if projection == "gate_up" else ("H", "I")
        experts_rows = numbers(config, f"E {rows}")
        (groups,) = numbers(config, f"{width}/32")
        if name.endswith("_blocks"):
            if (spec.dtype, spec.shape) != ("U8", (*experts_rows, groups, 16)):
                problems.append(f"{name}: is {spec}")
            last[projection] = name, spec
        elif name.endswith("_scales"):
            before = last.pop(projection, None)
            if before is None or before[0] != name.replace("_scales", "_blocks"):
                problems.append(f"{name}: would be joined with the blocks of {before}")
            elif (spec.dtype, spec.shape) != ("U8", before[1].shape[:-1]):
                problems.append(f"{name}: is {spec}")
            repacked.add(name)
        elif name.endswith("_bias"):
            if spec.shape != experts_rows:
                problems.append(f"{name}: is {spec}")
        else:
            problems.append(f"{name}: is not in MXFP4")
    if len(repacked) != 2 * config["num_hidden_layers"]:
        problems.append(f"{len(repacked)} tensors are in MXFP4")
    return problems + [f"{name}: is missing" for name in sorted(rest)]


# ---- both, on the released models and on files


@pytest.mark.parametrize("was_bf16", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_loader_rules_on_the_released_models(size: str, was_bf16: bool) -> None:
    plan = export_plan(size, was_bf16=was_bf16)
    config, specs = export_config(plan), written(plan)
    assert vllm_problems(config, specs) == []
    assert llama_cpp_problems(config, specs.items()) == []


@pytest.mark.parametrize("size", SIZES)
def test_the_rules_hold_for_what_openai_publishes_and_not_for_bf16(size: str) -> None:
    """So that they can fail, and do not ask for more than the published files have."""
    config, specs = published(size)
    assert vllm_problems(config, specs) == []
    assert llama_cpp_problems(config, specs.items()) == []
    mine = megatron_specs(config, specs)
    plan = make_plan("export", mine, FAMILY, config, where="megatron")
    unquantized = export_config(plan)
    layers = config["num_hidden_layers"]
    assert len(vllm_problems(unquantized, written(plan))) >= 4 * layers
    assert len(llama_cpp_problems(unquantized, written(plan).items())) >= 2 * layers
    backwards = reversed(list(specs.items()))
    assert len(llama_cpp_problems(config, backwards)) >= 2 * layers


def file_order(folder: Path) -> dict[str, TensorSpec]:
    """As a reader meets them: file by file, in the order of the data."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            found[name] = TensorSpec(tuple(entry["shape"]), entry["dtype"])
    return found


@pytest.mark.parametrize("origin", ["mxfp4", "mxfp4-square", "bf16"])
def test_loader_rules_on_files(
    origin: str, originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "SHARD_BYTES", 60_000)
    import_checkpoint(originals[origin], tmp_path / "mg")
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "mg", out, export_dtype="mxfp4")
    config = json.loads((out / "config.json").read_bytes())
    specs = file_order(out)
    assert vllm_problems(config, specs) == []
    assert llama_cpp_problems(config, specs.items()) == []
    files = sorted(out.glob("*.safetensors"))
    assert len(files) >= 5
    index = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert index.keys() == specs.keys()
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {n for n, f in index.items() if f == file.name} == set(shard.keys())


GGUF_VALUES = [v / 2 for v in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)]


def test_llama_cpp_reads_the_same_values(originals: dict[str, Path], tmp_path: Path) -> None:
    """Its own block: a scale byte, then 16 bytes of which byte j holds element j and, above it,
    element j + 16. Rearranged as it does, our blocks hold the Megatron side's weights.
    """
    import_checkpoint(originals["mxfp4"], tmp_path / "mg", keep_scales=False)
    export_checkpoint(tmp_path / "mg", tmp_path / "out", export_dtype="mxfp4")
    export_checkpoint(tmp_path / "mg", tmp_path / "full")
    found = load_all(tmp_path / "out")
    full = load_all(tmp_path / "full")
    values = torch.tensor(GGUF_VALUES)
    for name in (n.removesuffix("_blocks") for n in found if n.endswith("_blocks")):
        blocks, scales = found[name + "_blocks"], found[name + "_scales"]
        elements = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        packed = elements[..., :16] | (elements[..., 16:] << 4)
        stored = torch.cat([scales[..., None], packed], -1)
        assert stored.shape[-1] == 17
        codes = torch.cat([stored[..., 1:] & 15, stored[..., 1:] >> 4], -1)
        unit = 2.0 ** (stored[..., :1].float() - 127)
        weight = (values[codes.long()] * unit).flatten(-2)
        assert torch.equal(weight, full[name].float().transpose(1, 2)), name


def load_all(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


# ---- transformers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of our own that runs: as MXFP4, and the same in BF16, both from one Megatron folder."""
    root = tmp_path_factory.mktemp("published-form")
    tiny = runpy.run_path(str(Path(__file__).parents[1] / "support" / "tiny_gptoss.py"))
    model = tiny["tiny_model"](hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    config = model.config.to_dict() | {"architectures": ["GptOssForCausalLM"]}
    for name in ("dtype", "torch_dtype", "quantization_config"):
        config.pop(name, None)
    tensors = {n: t.detach().bfloat16() for n, t in model.state_dict().items()}
    write_hf_folder(root / "trained", config, tensors, shards=2)
    import_checkpoint(root / "trained", root / "mg-trained")
    export_checkpoint(root / "mg-trained", root / "mxfp4", export_dtype="mxfp4")
    import_checkpoint(root / "mxfp4", root / "mg")
    export_checkpoint(root / "mg", root / "again", export_dtype="mxfp4")
    export_checkpoint(root / "mg", root / "bf16")
    return {name: root / name for name in ("trained", "mxfp4", "again", "bf16")}


def run_transformers(folder: Path, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and logits in float32, loaded strictly."""
    from transformers import GptOssForCausalLM

    model, info = GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert not any(info.values()), info
    ids = torch.randint(134, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return dict(model.state_dict()), model.eval()(ids).logits


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_from_mxfp4_as_from_bf16(
    exported: dict[str, Path],
) -> None:
    from transformers import Mxfp4Config

    dequantize = {"quantization_config": Mxfp4Config(dequantize=True)}
    weights, logits = run_transformers(exported["mxfp4"], **dequantize)
    full, expected = run_transformers(exported["bf16"])
    assert weights.keys() == full.keys()
    assert [n for n in full if not torch.equal(weights[n], full[n])] == []
    assert torch.equal(logits, expected)
    assert expected.std() > 0.01
    again, _ = run_transformers(exported["again"], **dequantize)
    assert all(torch.equal(again[n], full[n]) for n in full)


@pytest.mark.filterwarnings("ignore")
def test_transformers_by_default_as_users_load_it(exported: dict[str, Path]) -> None:
    """Without a word about quantization, it finds the form in config.json by itself."""
    weights, logits = run_transformers(exported["mxfp4"])
    full, expected = run_transformers(exported["bf16"])
    assert all(torch.equal(weights[n], full[n]) for n in full)
    assert torch.equal(logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_quantization_costs_something_and_not_everything(exported: dict[str, Path]) -> None:
    """The logits of the weights as they were trained: near, and not the same."""
    _, before = run_transformers(exported["trained"])
    _, after = run_transformers(exported["bf16"])
    distance = float((after - before).norm() / before.norm())
    assert 0.001 < distance < 0.5
