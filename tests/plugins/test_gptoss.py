"""GPT-OSS: the table against the published files, and the config both ways."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import TensorSpec
from gptoss_convert.errors import ConfigError
from gptoss_convert.plan import make_plan
from gptoss_convert.testing import assert_roundtrip, hf_specs
from gptoss_plugins.gptoss import gptoss_convert_models, hf_config, megatron_config
from gptoss_plugins.mxfp4 import gptoss_convert_codecs

(FAMILY,) = gptoss_convert_models()
(MXFP4,) = gptoss_convert_codecs()
PUBLISHED = Path(__file__).parent / "published"  # names and shapes read off the released files


def published(size: str) -> tuple[dict, dict[str, TensorSpec]]:
    config = json.loads((PUBLISHED / f"config_{size}.json").read_text())
    with open(PUBLISHED / f"tensors_{size}.csv") as file:
        specs = {
            row["name"]: TensorSpec(tuple(map(int, row["shape"].split("x"))), row["dtype"])
            for row in csv.DictReader(file)
        }
    return config, specs


@pytest.mark.parametrize(
    ("size", "parameters"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)]
)
def test_the_released_models_fit_whole(size: str, parameters: int) -> None:
    config, specs = published(size)
    plan = make_plan("import", specs, FAMILY, config, where=size, codec=MXFP4)
    assert plan.parameters == parameters
    assert plan.bytes_in == sum(s.nbytes for s in specs.values())
    assert plan.bytes_out == 2 * parameters
    assert plan.dtype == "BF16"


SMALL = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 6,
    "intermediate_size": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "rms_norm_eps": 2e-5,
    "rope_scaling": {
        "beta_fast": 31.0,
        "beta_slow": 1.5,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 12345,
    "sliding_window": 9,
    "swiglu_limit": 6.5,
    "tie_word_embeddings": False,
    "vocab_size": 11,
}


def test_every_constant_comes_from_the_config() -> None:
    fields = megatron_config(SMALL)
    assert fields["yarn_rotary_scaling_factor"] == 8.0
    assert fields["yarn_original_max_position_embeddings"] == 64
    assert (fields["yarn_beta_fast"], fields["yarn_beta_slow"]) == (31.0, 1.5)
    assert fields["yarn_correction_range_round_to_int"] is False
    assert fields["rotary_base"] == 12345.0
    assert fields["window_size"] == [8, 0]
    assert fields["window_attn_skip_freq"] == 2
    assert fields["activation_func_clamp_value"] == 6.5
    assert fields["layernorm_epsilon"] == 2e-5
    assert (fields["num_moe_experts"], fields["moe_router_topk"]) == (3, 2)


def test_layers_that_do_not_alternate_become_a_list() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert megatron_config({**SMALL, "layer_types": kinds})["window_attn_skip_freq"] == [0, 1, 1]


def test_both_rope_schemas_mean_the_same() -> None:
    new = {k: v for k, v in SMALL.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**SMALL["rope_scaling"], "rope_theta": 12345}
    assert megatron_config(new) == megatron_config(SMALL)
    both = {**new, **SMALL}
    assert megatron_config(both) == megatron_config(SMALL)
    both["rope_theta"] = 1
    with pytest.raises(ConfigError, match="differ in rope_theta"):
        megatron_config(both)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.data(),
)
def test_config_there_and_back(layers, groups, each, experts, tied, data) -> None:
    kinds = st.sampled_from(["sliding_attention", "full_attention"])
    config = {
        **SMALL,
        "num_hidden_layers": layers,
        "layer_types": data.draw(st.lists(kinds, min_size=layers, max_size=layers)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * each,
        "num_local_experts": experts,
        "num_experts_per_tok": (experts + 1) // 2,
        "tie_word_embeddings": tied,
    }
    back = hf_config(megatron_config(config))
    assert {k: back[k] for k in config} == config
    assert back["rope_parameters"] == {**config["rope_scaling"], "rope_theta": 12345}


@pytest.mark.parametrize("intermediate", [5, 6], ids=["oblong", "square"])
def test_every_rule_there_and_back(intermediate: int) -> None:
    assert_roundtrip(FAMILY, {**SMALL, "intermediate_size": intermediate})


def test_tied_embeddings_have_no_head() -> None:
    assert "lm_head.weight" in hf_specs(FAMILY, SMALL)
    assert "lm_head.weight" not in hf_specs(FAMILY, {**SMALL, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": False}, "attention_bias False"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
        (
            {"rope_scaling": {**SMALL["rope_scaling"], "factor": None}},
            "factor missing or no positive",
        ),
        ({"rope_scaling": {**SMALL["rope_scaling"], "attention_factor": 3.0}}, "attention_factor"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        megatron_config({**SMALL, **change})


def test_yarn_is_never_lost_in_silence() -> None:
    bare = {k: v for k, v in SMALL.items() if k != "rope_scaling"}
    with pytest.raises(ConfigError, match="without YaRN"):
        megatron_config(bare)


@pytest.mark.parametrize(
    ("blocks", "scales", "says"),
    [
        (TensorSpec((2, 4, 1, 16), "I8"), TensorSpec((2, 4, 1), "U8"), "blocks are I8"),
        (TensorSpec((2, 4, 1, 16), "U8"), TensorSpec((2, 4, 2), "U8"), "are not"),
        (TensorSpec((2, 4, 1, 8), "U8"), TensorSpec((2, 4, 1), "U8"), "are not"),
    ],
)
def test_damaged_mxfp4_is_refused(blocks: TensorSpec, scales: TensorSpec, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MXFP4.spec([blocks, scales])
