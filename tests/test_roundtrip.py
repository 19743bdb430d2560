"""The main job on real folders: what goes in comes out, and transformers reads it strictly."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gptoss_convert import execute
from gptoss_convert.convert import export_checkpoint, import_checkpoint, prepare_export
from gptoss_convert.errors import CheckpointError, ConvertError, MismatchError
from gptoss_convert.testing import distinct, hf_specs, make_tensors, write_hf_folder
from gptoss_plugins.demo import CONFIG, compare
from gptoss_plugins.gptoss import gptoss_convert_models

(FAMILY,) = gptoss_convert_models()
FILES = {
    "generation_config.json": b'{"eos_token_id": [3, 4]}',
    "tokenizer.json": '{"odd": "\\u00e9 \u00e9",\n  "spaces":  1 }'.encode(),
    "tokenizer_config.json": b"{}\n\n",
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": "{{ '\u2603' }}\r\n".encode(),
}


def config_of(**changes) -> dict:
    """The published form, small; BF16 unless the change keeps the quantization."""
    config = {**CONFIG, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 131}
    config |= {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 9} | changes
    kinds = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    config["layer_types"] = kinds[: config["num_hidden_layers"]]
    return config


def bf16(config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    return config, make_tensors(FAMILY, config)


def mxfp4(config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = {}
    for seed, (name, spec) in enumerate(hf_specs(FAMILY, config).items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = distinct(spec, seed)
            continue
        experts, inner, rows = spec.shape
        generator = torch.Generator().manual_seed(seed)
        shape = (experts, rows, inner // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[name + "_blocks"] = blocks
        scales = torch.randint(0, 253, shape, generator=generator, dtype=torch.uint8)
        tensors[name + "_scales"] = scales
    return config, tensors


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def roundtrip(tmp_path: Path, made: tuple[dict, dict], **options) -> Path:
    config, tensors = made
    write_hf_folder(tmp_path / "in", config, tensors, shards=3, files=FILES)
    import_checkpoint(tmp_path / "in", tmp_path / "mid", **options)
    export_checkpoint(tmp_path / "mid", tmp_path / "out", **options)
    return tmp_path / "out"


SIZES = pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden_size": 96},  # square experts: shapes cannot tell orientation
        {"num_local_experts": 5, "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 77},
        {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4},
    ],
    ids=["oblong", "square", "one-group", "no-gqa"],
)


@SIZES
def test_bf16_comes_back_bit_for_bit(tmp_path: Path, change: dict) -> None:
    config, tensors = bf16(config_of(torch_dtype="bfloat16", **change))
    out = roundtrip(tmp_path, (config, tensors))
    found = loaded(out)
    assert found.keys() == tensors.keys()
    assert [n for n in tensors if not torch.equal(found[n], tensors[n])] == []
    for name in (*FILES, "config.json"):
        assert filecmp.cmp(tmp_path / "in" / name, out / name, shallow=False), name


@SIZES
def test_mxfp4_comes_back_as_its_values(tmp_path: Path, change: dict) -> None:
    config, tensors = mxfp4(config_of(**change))
    out = roundtrip(tmp_path, (config, tensors))
    assert compare(tensors, out) == len(tensors) - 2 * config["num_hidden_layers"]
    for name in FILES:
        assert filecmp.cmp(tmp_path / "in" / name, out / name, shallow=False), name
    written = json.loads((out / "config.json").read_text())
    changed = {k for k in config.keys() | written if config.get(k) != written.get(k)}
    assert changed == {"quantization_config", "torch_dtype", "dtype"}
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_both_stored_forms_of_the_same_weights_import_alike(tmp_path: Path) -> None:
    """MXFP4 is [E, out, in], BF16 [E, in, out]; square experts, so only the form can tell."""
    out = roundtrip(tmp_path, mxfp4(config_of(hidden_size=96)))
    import_checkpoint(out, tmp_path / "again")
    for file in sorted((tmp_path / "mid/iter_0000000").glob("*.distcp")):
        assert filecmp.cmp(file, tmp_path / "again/iter_0000000" / file.name, shallow=False)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 3), st.integers(1, 3), st.integers(3, 40), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_any_size(
    tmp_path_factory, layers, groups, each, head_dim, hidden, inner, vocab, experts, quantized
) -> None:
    config = config_of(
        num_hidden_layers=layers,
        num_key_value_heads=groups,
        num_attention_heads=groups * each,
        head_dim=2 * head_dim,
        hidden_size=32 * hidden,
        intermediate_size=32 * inner,
        vocab_size=vocab,
        num_local_experts=experts,
        num_experts_per_tok=1,
    )
    made = mxfp4(config) if quantized else bf16(config)
    out = roundtrip(tmp_path_factory.mktemp("any"), made)
    assert compare(made[1], out) == len(hf_specs(FAMILY, config))


def test_transformers_loads_it_strictly_with_the_same_logits(tmp_path: Path) -> None:
    from transformers import GptOssForCausalLM

    small = {
        "max_position_embeddings": 512,
        "vocab_size": 128,
        "pad_token_id": 99,
        "eos_token_id": 98,
    }
    scaling = {**CONFIG["rope_scaling"], "original_max_position_embeddings": 64}
    out = roundtrip(tmp_path, bf16(config_of(rope_scaling=scaling, **small)))
    ids = torch.randint(128, (1, 150), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (tmp_path / "in", out):
        model, info = GptOssForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert logits[0].std() > 0.01
    assert torch.equal(*logits)


def test_float32_stays_float32_and_casts_say_what_they_cost(tmp_path: Path, caplog) -> None:
    config = {k: v for k, v in config_of().items() if k != "quantization_config"}
    tensors = make_tensors(FAMILY, config, "F32")
    out = roundtrip(tmp_path, (config, tensors))
    assert all(torch.equal(t, tensors[n]) for n, t in loaded(out).items())
    assert not [r for r in caplog.records if "rounding" in r.message]
    export_checkpoint(tmp_path / "mid", tmp_path / "half", export_dtype="bf16")
    assert all(torch.equal(t, tensors[n].bfloat16()) for n, t in loaded(tmp_path / "half").items())
    assert "rounding F32 to BF16" in caplog.text


def test_a_value_too_large_for_the_type_stops_the_conversion(tmp_path: Path) -> None:
    config, tensors = bf16(config_of())
    tensors["model.norm.weight"][5] = 1e30
    write_hf_folder(tmp_path / "in", config, tensors)
    with pytest.raises(ConvertError, match=r"decoder\.final_layernorm\.weight: holds values too"):
        import_checkpoint(tmp_path / "in", tmp_path / "mid", torch_dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("piece", [1, 100, 3000])
def test_finely_cut_steps_give_the_same_bytes(tmp_path: Path, monkeypatch, piece: int) -> None:
    """At full width every step is cut; here too, as finely as it can be, against whole steps."""
    made = mxfp4(config_of(num_local_experts=7))
    write_hf_folder(tmp_path / "in", *made, shards=3)
    import_checkpoint(tmp_path / "in", tmp_path / "a", workers=1)
    export_checkpoint(tmp_path / "a", tmp_path / "a_hf", workers=1)
    assert compare(made[1], tmp_path / "a_hf") == 37
    monkeypatch.setattr(execute, "PIECE_BYTES", piece)
    import_checkpoint(tmp_path / "in", tmp_path / "b", workers=3)
    export_checkpoint(tmp_path / "a", tmp_path / "b_hf", workers=3)
    for one, two in (("a", "b"), ("a_hf", "b_hf")):
        for file in sorted(p for p in (tmp_path / one).rglob("*") if p.is_file()):
            other = tmp_path / two / file.relative_to(tmp_path / one)
            assert filecmp.cmp(file, other, shallow=False), file


def test_the_reference_model(tmp_path: Path) -> None:
    """--hf-model on export: the BF16 or MXFP4 repository, or none; never another model."""
    out = roundtrip(tmp_path, mxfp4(config_of()))
    for reference in (tmp_path / "in", out, "openai/gpt-oss-20b"):
        prepare_export(tmp_path / "mid", hf_model=reference)
    other = write_hf_folder(tmp_path / "other", *bf16(config_of(sliding_window=11)))
    with pytest.raises(CheckpointError, match=r"another model .*window_size"):
        prepare_export(tmp_path / "mid", hf_model=other)


def test_a_folder_without_a_config_takes_it_from_megatrons_own(tmp_path: Path) -> None:
    out = roundtrip(tmp_path, bf16(config_of()))
    (tmp_path / "mid/iter_0000000/huggingface/config.json").unlink()
    export_checkpoint(tmp_path / "mid", tmp_path / "run_config")
    (tmp_path / "mid/iter_0000000/run_config.yaml").unlink()
    export_checkpoint(tmp_path / "mid/iter_0000000", tmp_path / "args")
    want = json.loads((out / "config.json").read_text())
    for name in ("run_config", "args"):
        assert loaded(tmp_path / name).keys() == loaded(out).keys()
        config = json.loads((tmp_path / name / "config.json").read_text())
        unknown_to_megatron = {"eos_token_id", "pad_token_id", "initial_context_length"}
        assert {k: config[k] for k in want if k not in unknown_to_megatron} == {
            k: v for k, v in want.items() if k not in unknown_to_megatron
        }


def test_two_names_of_one_tensor_must_agree(tmp_path: Path) -> None:
    """A stale second copy of a norm must not win by accident."""
    from gptoss_plugins.megatron import metadata
    from gptoss_plugins.megatron.source import TorchDistSource

    roundtrip(tmp_path, bf16(config_of()))
    folder = tmp_path / "mid/iter_0000000"
    contents = metadata.load(folder)
    stale = contents.tensors["decoder.layers.self_attention.linear_qkv.layer_norm_weight"]
    tensors = {**contents.tensors, "decoder.layers.mlp.linear_fc1.layer_norm_weight": stale}
    (folder / ".metadata").write_bytes(metadata.dump(metadata.Contents(tensors, contents.objects)))
    assert TorchDistSource(folder).specs()
    with pytest.raises(MismatchError, match="two names of one tensor"):
        export_checkpoint(tmp_path / "mid", tmp_path / "stale")


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """Half old, half new would load; size and time of change may even have been kept up."""
    folder = write_hf_folder(tmp_path / "in", *bf16(config_of(num_hidden_layers=3)), shards=1)
    shard = folder / "model.safetensors"
    stat = shard.stat()

    def meddle(_: int) -> None:
        with open(shard, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(CheckpointError, match="changed while it was being converted"):
        import_checkpoint(folder, tmp_path / "out", workers=1, progress=meddle)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
