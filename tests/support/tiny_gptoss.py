"""A tiny GPT-OSS in transformers, and its own, slow and plain, translation to Megatron.

The translation shares no code with the converter: it is what the converter is judged by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# No two sizes alike, so that no axis can be mistaken for another. Layers: three for each of two
# pipeline stages, an odd number, so that a stage that counts from its own start is found out.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 134,
    "sliding_window": 9,
    "max_position_embeddings": 2048,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


def tiny_model(seed: int = 0, **sizes: Any) -> Any:
    """GptOssForCausalLM in float32 whose weights are bfloat16 numbers, big enough to matter."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**SIZES | sizes, rope_parameters=YARN, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(_scaled(name, values).bfloat16())
    return model


def _scaled(name: str, values: Tensor) -> Tensor:
    """Norms about 1, experts large enough that the activation's clamp at 7 is reached."""
    if "norm" in name:
        return 1 + 0.2 * values
    for part, scale in (("sinks", 1.0), ("embed", 1.0), ("experts", 0.5), ("bias", 0.5)):
        if part in name:
            return scale * values
    return 0.15 * values


def megatron_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron's names for what a Hugging Face ``config.json`` says, in its old or new style."""
    rope = config.get("rope_parameters") or config["rope_scaling"]
    kinds = config["layer_types"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "add_bias_linear": True,
        "add_qkv_bias": config["attention_bias"],
        "num_moe_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_size": [config["sliding_window"] - 1, 0],
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
        "rotary_base": rope.get("rope_theta", config.get("rope_theta")),
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_correction_range_round_to_int": rope["truncate"],
    }


def _qkv(config: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of each group in turn: its query heads, its key head, its value head."""
    d, groups = config["head_dim"], config["num_key_value_heads"]
    width = config["num_attention_heads"] // groups * d
    rows: list[Tensor] = []
    for g in range(groups):
        rows += [q[g * width : (g + 1) * width], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
    return torch.cat(rows)


def _layer(config: dict[str, Any], hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors by the part of their checkpoint name that follows the layer."""
    attention, experts = "self_attention.", "mlp.experts.experts."
    gate_up, gate_up_bias = hf["mlp.experts.gate_up_proj"], hf["mlp.experts.gate_up_proj_bias"]
    out = {
        attention + "linear_qkv.layer_norm_weight": hf["input_layernorm.weight"],
        attention + "core_attention.softmax_offset": hf["self_attn.sinks"],
        "pre_mlp_layernorm.weight": hf["post_attention_layernorm.weight"],
        experts + "linear_fc1.weight": torch.cat(
            [gate_up[:, :, 0::2].transpose(1, 2), gate_up[:, :, 1::2].transpose(1, 2)], dim=1
        ),
        experts + "linear_fc1.bias": torch.cat([gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]], 1),
        experts + "linear_fc2.weight": hf["mlp.experts.down_proj"].transpose(1, 2),
        experts + "linear_fc2.bias": hf["mlp.experts.down_proj_bias"],
    }
    for kind in ("weight", "bias"):
        q, k, v = (hf[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
        out[attention + f"linear_qkv.{kind}"] = _qkv(config, q, k, v)
        out[attention + f"linear_proj.{kind}"] = hf[f"self_attn.o_proj.{kind}"]
        out[f"mlp.router.{kind}"] = hf[f"mlp.router.{kind}"]
    return out


def megatron_tensors(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a stacked distributed checkpoint: key -> whole tensor, layers first."""
    layers = []
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        layers.append(_layer(config, cut))
    stacked = {
        f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers])
        for name in layers[0]
    }
    return stacked | {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }


def prompt(vocabulary: int, length: int, batch: int = 2, seed: int = 1) -> Tensor:
    """Token ids ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far our logits are from theirs."""
    return {
        "rel_l2": ((ours - theirs).norm() / theirs.norm()).item(),
        "max_abs": (ours - theirs).abs().max().item(),
        "argmax_equal": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
