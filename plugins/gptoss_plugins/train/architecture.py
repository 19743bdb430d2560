"""The whole model that a recipe's ``model`` section names, in Hugging Face's and Megatron's fields.

The published sizes are those of openai/gpt-oss-20b's and -120b's ``config.json``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gptoss_plugins import gptoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_plugins.train.config import ModelConfig

# Our field -> config.json's
_NAMES: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "num_moe_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
_20B: Mapping[str, Any] = {
    "architectures": [gptoss.ARCHITECTURE],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": _ROPE,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
# Sizes that are all different, as far as they may be; 272 is room for 256 bytes and 16 special tokens.
_TINY: Mapping[str, Any] = {
    "eos_token_id": 256,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": 257,
    "sliding_window": 16,
    "vocab_size": 272,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "20b": _20B,
    "120b": {**_20B, "num_hidden_layers": 36, "num_local_experts": 128},
    "tiny": {**_20B, **_TINY},
}


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The model's ``config.json``, unquantized."""
    config = dict(SIZES[model.size])
    config |= {hf: v for ours, hf in _NAMES.items() if (v := getattr(model, ours)) is not None}
    config["experts_per_token"] = config["num_experts_per_tok"]
    config["router_aux_loss_coef"] = model.moe_aux_loss_coeff
    kinds = ("sliding_attention", "full_attention")
    config["layer_types"] = [kinds[i % 2] for i in range(config["num_hidden_layers"])]
    return config


def megatron_fields(model: ModelConfig) -> dict[str, Any]:
    """The model in megatron-core's names, as ``gpt_model.config.make_config`` takes them.

    ``seq_length`` in it is what the checkpoint says of itself, the longest sequence; the length of
    training sequences is ``model.seq_length``.

    Raises:
        ConfigError: the sizes make no GPT-OSS model.

    """
    fields = gptoss.megatron_config(hf_config(model))
    return fields | {"moe_router_load_balancing_type": model.moe_router_load_balancing_type}


def parameters(model: ModelConfig) -> int:
    """How many weights the model has: 20,914,757,184 of 20B."""
    config = hf_config(model)
    return sum(
        math.prod(shape) * (config["num_hidden_layers"] if "{L}" in name else 1)
        for rule in gptoss.rules(config)
        for name, shape in rule.hf.items()
    )
