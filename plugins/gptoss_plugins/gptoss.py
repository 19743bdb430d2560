"""GPT-OSS 20B and 120B: the mapping table, and the config both ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gptoss_convert import (
    QKV,
    Copy,
    Experts,
    ModelFamily,
    PadVocab,
    Rule,
    Shard,
    hookimpl,
)
from gptoss_convert.errors import ConfigError
from gptoss_convert.plan import MOST_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.types import Config

ARCHITECTURE = "GptOssForCausalLM"
HF, MG = "model.layers.{L}.", "decoder.layers.{L}."
NUMBER = (int, float)
_LARGEST = 1e300  # JSON has integers that no float holds
UNQUANTIZED = (  # as both published configs have it; everything but the experts
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "rms_norm_eps": NUMBER,
    "sliding_window": int,
    "layer_types": list,
    "max_position_embeddings": int,
    "attention_bias": bool,
    "hidden_act": str,
}


def rules(config: Config) -> Iterator[Rule]:
    """The mapping table; letters as in ``gptoss_convert.ops``."""
    V, H, I = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    E, D = config["num_local_experts"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * D, groups * D
    vocab, qkv = PadVocab(V), QKV(heads, groups, D)
    att, mlp = HF + "self_attn.", HF + "mlp."
    to_att, to_mlp = MG + "self_attention.", MG + "mlp."

    yield Rule(
        {"model.embed_tokens.weight": (V, H)},
        "embedding.word_embeddings.weight",
        vocab,
        Shard.COLUMN,
    )
    yield Rule({HF + "input_layernorm.weight": (H,)}, to_att + "linear_qkv.layer_norm_weight")
    yield Rule(
        {
            att + "q_proj.weight": (q, H),
            att + "k_proj.weight": (kv, H),
            att + "v_proj.weight": (kv, H),
        },
        to_att + "linear_qkv.weight",
        qkv,
        Shard.COLUMN,
    )
    yield Rule(
        {att + "q_proj.bias": (q,), att + "k_proj.bias": (kv,), att + "v_proj.bias": (kv,)},
        to_att + "linear_qkv.bias",
        qkv,
        Shard.COLUMN,
    )
    yield Rule(
        {att + "sinks": (heads,)}, to_att + "core_attention.softmax_offset", shard=Shard.COLUMN
    )
    yield Rule({att + "o_proj.weight": (H, q)}, to_att + "linear_proj.weight", shard=Shard.ROW)
    yield Rule({att + "o_proj.bias": (H,)}, to_att + "linear_proj.bias")
    yield Rule(
        {HF + "post_attention_layernorm.weight": (H,)},
        MG + "pre_mlp_layernorm.weight",
        also=(to_mlp + "linear_fc1.layer_norm_weight",),  # as the stock local spec calls it
    )
    yield Rule({mlp + "router.weight": (E, H)}, to_mlp + "router.weight")
    yield Rule({mlp + "router.bias": (E,)}, to_mlp + "router.bias")
    yield Rule(
        {mlp + "experts.gate_up_proj": (E, H, 2 * I)},
        to_mlp + "experts.linear_fc1.weight{E}",
        Experts(transpose=True, interleaved=True),
        Shard.GATED,
        quantizable=True,
    )
    yield Rule(
        {mlp + "experts.gate_up_proj_bias": (E, 2 * I)},
        to_mlp + "experts.linear_fc1.bias{E}",
        Experts(interleaved=True),
        Shard.GATED,
    )
    yield Rule(
        {mlp + "experts.down_proj": (E, I, H)},
        to_mlp + "experts.linear_fc2.weight{E}",
        Experts(transpose=True),
        Shard.ROW,
        quantizable=True,
    )
    yield Rule(
        {mlp + "experts.down_proj_bias": (E, H)}, to_mlp + "experts.linear_fc2.bias{E}", Experts()
    )
    yield Rule({"model.norm.weight": (H,)}, "decoder.final_layernorm.weight", Copy())
    if not config.get("tie_word_embeddings", False):
        yield Rule({"lm_head.weight": (V, H)}, "output_layer.weight", vocab, Shard.COLUMN)


def megatron_config(config: Config) -> dict[str, Any]:
    """Hugging Face's config in megatron-core's names (``TransformerConfig`` and ``GPTModel``)."""
    _require_gpt_oss(config)
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "moe_ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "make_vocab_size_divisible_by": math.gcd(config["vocab_size"], 128),
        "should_pad_vocab": False,
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": float(config["rms_norm_eps"]),
        "init_method_std": _number(config, "initializer_range", 0.02),
        "attention_dropout": _number(config, "attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": True,
        "activation_func": "quick_gelu",
        "activation_func_clamp_value": _number(config, "swiglu_limit", 7.0),
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_size": [config["sliding_window"] - 1, 0],
        "window_attn_skip_freq": _window_pattern(config["layer_types"]),
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
        "num_moe_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": _number(config, "router_aux_loss_coef", 0.9),
        "moe_layer_freq": 1,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        **_megatron_rope(config),
    }


def hf_config(megatron: Config) -> dict[str, Any]:
    """The inverse of :func:`megatron_config`; RoPE in both of Hugging Face's schemas.

    Fields that Megatron does not know keep transformers' defaults.
    """
    layers, window = megatron["num_layers"], _windows(megatron)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": megatron.get("attention_dropout", 0.0),
        "head_dim": megatron["kv_channels"],
        "hidden_act": "silu",
        "hidden_size": megatron["hidden_size"],
        "initializer_range": megatron.get("init_method_std", 0.02),
        "intermediate_size": megatron.get("moe_ffn_hidden_size") or megatron["ffn_hidden_size"],
        "layer_types": ["sliding_attention" if w else "full_attention" for w in window],
        "max_position_embeddings": megatron["seq_length"],
        "num_attention_heads": megatron["num_attention_heads"],
        "num_experts_per_tok": megatron["moe_router_topk"],
        "num_hidden_layers": layers,
        "num_key_value_heads": megatron["num_query_groups"],
        "num_local_experts": megatron["num_moe_experts"],
        "rms_norm_eps": megatron["layernorm_epsilon"],
        "router_aux_loss_coef": megatron.get("moe_aux_loss_coeff", 0.9),
        "sliding_window": _window_size(megatron) + 1,
        "swiglu_limit": megatron["activation_func_clamp_value"],
        "tie_word_embeddings": megatron.get("share_embeddings_and_output_weights", False),
        "vocab_size": megatron["vocab_size"],
        **_hf_rope(megatron),
    }


def _windows(megatron: Config) -> list[Any]:
    """By layer, whether its attention has a window."""
    layers, freq = megatron["num_layers"], megatron["window_attn_skip_freq"]
    if isinstance(freq, list | tuple):
        return list(freq)
    whole = all(type(n) is int and n > 0 for n in (layers, freq))
    if not whole or layers > MOST_LAYERS:
        raise ConfigError(
            f"Megatron's config: num_layers {layers} and window_attn_skip_freq {freq} make no model; "
            f"restore it, or name the model with --hf-model"
        )
    return [(i + 1) % freq != 0 for i in range(layers)]


def _window_size(megatron: Config) -> int:
    """How far back a window reaches."""
    size = megatron["window_size"]
    if not isinstance(size, list | tuple) or len(size) != 2 or type(size[0]) is not int:
        raise ConfigError(
            f"Megatron's config: window_size {size} is no pair of numbers; restore it, or name the "
            f"model with --hf-model"
        )
    return int(size[0])


def _require_gpt_oss(config: Config) -> None:
    """Refuse what looks like GPT-OSS but computes something else."""
    for name, kind in FIELDS.items():
        least = 1 if kind is int else 0.0 if kind is NUMBER else None
        if least is not None and not (_is_number(config[name]) and config[name] >= least):
            raise ConfigError(
                f"config.json: {name} is {config[name]}; restore the model's own config.json"
            )
    layers, kinds = config["num_hidden_layers"], config["layer_types"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    wrong = {
        "hidden_act": config["hidden_act"] != "silu",
        "attention_bias": config["attention_bias"] is not True,
        "layer_types": len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds),
        "num_key_value_heads": heads % groups != 0,
        "num_experts_per_tok": config["num_experts_per_tok"] > config["num_local_experts"],
    }
    for name, bad in wrong.items():
        if bad:
            raise ConfigError(
                f"config.json: {name} {config[name]!r} does not make a GPT-OSS model "
                f"({layers} layers, {heads} heads); restore the model's own config.json"
            )


def _number(config: Config, name: str, default: float) -> float:
    """A field that older configs lack; there, what GPT-OSS has always had."""
    value = config.get(name, default)
    if not _is_number(value):
        raise ConfigError(
            f"config.json: {name} is {value!r} and no number; restore the model's own config.json"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    """Finite, and within a float's range."""
    is_one = isinstance(value, NUMBER) and not isinstance(value, bool)
    return is_one and -_LARGEST < value < _LARGEST


def _window_pattern(kinds: list[str]) -> int | list[int]:
    """``layer_types`` -> ``window_attn_skip_freq``: 2 if they alternate from sliding, else a list."""
    window = [int(kind == "sliding_attention") for kind in kinds]
    return 2 if window == [(i + 1) % 2 for i in range(len(kinds))] else window


def _megatron_rope(config: Config) -> dict[str, Any]:
    rope = _rope_parameters(config)
    fields = {"rotary_base": float(rope["rope_theta"]), "rotary_percent": 1.0}
    if rope.get("rope_type", "default") == "default":
        return {**fields, "position_embedding_type": "rope"}
    return {
        **fields,
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": _number(rope, "beta_fast", 32.0) or 32.0,
        "yarn_beta_slow": _number(rope, "beta_slow", 1.0) or 1.0,
        "yarn_mscale": rope.get("mscale"),
        "yarn_mscale_all_dim": rope.get("mscale_all_dim"),
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }


def _hf_rope(megatron: Config) -> dict[str, Any]:
    theta = megatron["rotary_base"]
    if megatron.get("position_embedding_type") != "yarn":
        return {
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    scaling = {
        "rope_type": "yarn",
        "factor": megatron["yarn_rotary_scaling_factor"],
        "original_max_position_embeddings": megatron["yarn_original_max_position_embeddings"],
        "beta_fast": megatron["yarn_beta_fast"],
        "beta_slow": megatron["yarn_beta_slow"],
        "truncate": megatron["yarn_correction_range_round_to_int"],
    }
    for name in ("mscale", "mscale_all_dim"):
        if (value := megatron.get(f"yarn_{name}")) is not None:
            scaling[name] = value
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": theta},
    }


def _rope_parameters(config: Config) -> dict[str, Any]:
    """RoPE's constants from either schema: ``rope_parameters`` (transformers 5), or ``rope_theta``
    and ``rope_scaling`` (as published); where both stand, they must agree.
    """
    if "rope_parameters" not in config and "rope_scaling" not in config:
        raise ConfigError(
            "config.json: neither rope_parameters nor rope_scaling is there, and without YaRN the "
            "model would be another; restore the model's own config.json"
        )
    old, new = (_rope_object(config, name) for name in ("rope_scaling", "rope_parameters"))
    if "rope_theta" in config:
        old["rope_theta"] = config["rope_theta"]
    for rope in (old, new):
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
    if clash := sorted(k for k in old.keys() & new.keys() if old[k] != new[k]):
        raise ConfigError(
            f"config.json: rope_parameters and rope_theta/rope_scaling differ in "
            f"{', '.join(clash)}; remove the wrong one"
        )
    return _require_known_rope({**old, **new})


def _rope_object(config: Config, name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"config.json: {name} is {value!r} and no object; restore the model's own config.json"
        )
    return {**value}


def _require_known_rope(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    needed = ["rope_theta"]
    if kind == "yarn":
        needed += ["factor", "original_max_position_embeddings"]
    elif kind != "default":
        raise ConfigError(f"config.json: rope type {kind!r} is not one GPT-OSS has; use yarn")
    if absent := [name for name in needed if not _is_positive(rope.get(name))]:
        raise ConfigError(
            f"config.json: RoPE's {', '.join(absent)} missing or no positive number, in "
            f"rope_parameters as well as in rope_theta and rope_scaling; restore the model's own "
            f"config.json"
        )
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        if rope.get(name) is None:
            rope.pop(name, None)
        else:
            _number(rope, name, 0.0)
    _require_default_attention_factor(rope)
    return rope


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _require_default_attention_factor(rope: dict[str, Any]) -> None:
    """Megatron derives YaRN's attention factor; one that was set by hand cannot be carried."""
    given = rope.get("attention_factor")
    if given is not None and not math.isclose(given, 0.1 * math.log(rope["factor"]) + 1):
        raise ConfigError(
            f"config.json: attention_factor {given} is not YaRN's own (0.1 ln factor + 1), which "
            f"is all Megatron knows; leave it out"
        )


@hookimpl
def gptoss_convert_models() -> Iterator[ModelFamily]:
    """GPT-OSS of any size."""
    yield ModelFamily(
        "gpt-oss",
        frozenset({ARCHITECTURE}),
        rules,
        megatron_config,
        hf_config,
        FIELDS,
        unquantized=UNQUANTIZED,
    )
