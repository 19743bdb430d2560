"""Megatron's field names (a plain mapping) -> the TransformerConfig of a GPT-OSS model.

The mapping is what a ``ModelFamily.megatron_config`` returns, or the ``model`` section of a
``run_config.yaml``. Names fall into three classes:

* *taken*: they describe the model (``REQUIRED_FIELDS``, ``OPTIONAL_FIELDS``);
* *assumed*: these modules know one value only (``ASSUMED_FIELDS``); another is an error;
* everything else says how to run (fusions, parallel sizes, dtype). That belongs to the machine, not
  to the checkpoint, and is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoss_convert.errors import ConfigError

REQUIRED_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "seq_length",
    "layernorm_epsilon",
    "add_bias_linear",
    "add_qkv_bias",
    "num_moe_experts",
    "moe_router_topk",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "rotary_base",
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)

# Taken if present; the value is what an absent field means for GPT-OSS.
OPTIONAL_FIELDS: Mapping[str, Any] = {
    "moe_ffn_hidden_size": None,  # as ffn_hidden_size
    "yarn_mscale": None,  # both None: 0.1 ln(factor) + 1, see rope.concentration
    "yarn_mscale_all_dim": None,
    "softmax_scale": None,  # kv_channels ** -0.5
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "fp32_residual_connection": False,
    "moe_router_dtype": None,
    "moe_router_pre_softmax": False,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
}

ASSUMED_FIELDS: Mapping[str, Any] = {
    "activation_func": "quick_gelu",
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "yarn",
    "attention_dropout": 0.0,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "no_rope_freq": None,
    "mtp_num_layers": None,
    "moe_layer_freq": 1,  # a list, even of ones, would change the names in checkpoints
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
}

# Fused kernels come from Transformer Engine, Apex or CUDA extensions: none is needed here.
_UNFUSED = dict.fromkeys(
    (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "persist_layer_norm",
    ),
    False,
)


SIGMOID_SCALE = 1.702  # of quick_gelu


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``; Megatron's own is the same, but compiled (11 s on a CPU)."""
    return x * torch.sigmoid(SIGMOID_SCALE * x)


@dataclass
class GptOssConfig(TransformerConfig):  # type: ignore[misc]  # megatron-core is untyped
    """TransformerConfig plus what GPTModel takes from elsewhere.

    Megatron's GPTModel reads the ``yarn_*`` names with ``getattr(config, ...)``, yet no version
    (0.16.1 to 0.19.2) declares them.
    """

    vocab_size: int = 0
    seq_length: int = 0
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool = True
    recompute_activation: bool = False  # of the experts; moe_act is for Transformer Engine's


def make_config(
    fields: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    random_weights: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> GptOssConfig:
    """The config for this machine and for the parallel layout set up by ``initialize_parallel``.

    Args:
        fields: Megatron names -> plain values, see the module's text.
        dtype: type of the parameters and of what pipeline stages exchange.
        device: where the parameters are made.
        sequence_parallel: split activations along the sequence (training with TP needs it).
        random_weights: draw initial weights; otherwise memory stays as it is until a load.
        overrides: TransformerConfig fields set last, such as a recompute policy.

    Raises:
        ConfigError: listing every field that is missing, contradicts the modules here, or does
            not divide by the parallel layout.

    """
    if problems := [*_missing(fields), *_contradictions(fields)]:
        raise ConfigError("Megatron config: " + "; ".join(problems))
    try:
        config = GptOssConfig(
            **(
                _model_fields(fields)
                | _machine_fields(dtype, device)
                | {"sequence_parallel": sequence_parallel, "perform_initialization": random_weights}
                | dict(overrides or {})
            )
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core does not build this model: {error}") from error
    if problems := [*_windows(config), *_remainders(config)]:
        raise ConfigError("Megatron config: " + "; ".join(problems))
    return config


def _missing(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in REQUIRED_FIELDS:
        if name not in fields:
            yield f"{name} is missing"


def _contradictions(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, known in ASSUMED_FIELDS.items():
        value = _plain(fields.get(name, known))
        if value != known:
            yield f"{name} is {value!r}, and only {known!r} is implemented"


def _plain(value: Any) -> Any:
    """A function, or OmegaConf's ``{_target_: a.b.name}``, by its last name; else as it is."""
    if isinstance(value, Mapping) and "_target_" in value:
        value = value["_target_"]
    if callable(value):
        value = value.__name__
    return value.rpartition(".")[2] if isinstance(value, str) else value


def _model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    taken = {name: fields[name] for name in REQUIRED_FIELDS}
    taken |= {name: fields.get(name, default) for name, default in OPTIONAL_FIELDS.items()}
    if taken["moe_ffn_hidden_size"] is None:
        taken["moe_ffn_hidden_size"] = taken["ffn_hidden_size"]
    if (window := taken["window_size"]) is not None:
        taken["window_size"] = tuple(window)
    if isinstance(freq := taken["window_attn_skip_freq"], tuple):
        taken["window_attn_skip_freq"] = list(freq)
    known = ("attention_dropout", "gated_linear_unit", "normalization")
    return taken | {name: ASSUMED_FIELDS[name] for name in known} | {"activation_func": quick_gelu}


def _machine_fields(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        **_UNFUSED,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "attention_softmax_in_fp32": True,
        "use_cpu_initialization": device.type == "cpu",
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "moe_token_dispatcher_type": "allgather",  # "alltoall" makes a CUDA stream at once
    }


def _windows(config: GptOssConfig) -> Iterator[str]:
    window, freq = config.window_size, config.window_attn_skip_freq
    if window is not None and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        yield f"window_size is {window}; a causal window is (tokens to the left, 0)"
    if isinstance(freq, list) and len(freq) != config.num_layers:
        yield f"window_attn_skip_freq has {len(freq)} entries for {config.num_layers} layers"


def _remainders(config: GptOssConfig) -> Iterator[str]:
    tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    parts = [("vocab_size", tp), ("num_attention_heads", tp), ("num_moe_experts", ep)]
    for name, size in parts:
        if getattr(config, name) % size:
            yield f"{name} {getattr(config, name)} does not divide by {size} ranks"
    cp, groups = config.context_parallel_size, config.num_query_groups // tp
    if cp > 1 and groups % cp:
        yield f"num_query_groups {config.num_query_groups} does not divide by {tp} times {cp} ranks"
    if config.expert_tensor_parallel_size > 1:
        yield "tensor parallelism inside experts is not implemented"
