"""The layer spec: megatron-core's local one, with five parts replaced.

| part | why not the stock one |
| --- | --- |
| attention's cache, core attention, router | bound to CUDA |
| experts | see experts.py |
| norm | stock refuses sequence parallelism, or is Transformer Engine's if that is installed |
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import nn

from gptoss_plugins.gpt_model.attention import GptOssSelfAttention, SinkAttention
from gptoss_plugins.gpt_model.experts import GroupedExperts
from gptoss_plugins.gpt_model.router import PlainRouter

if TYPE_CHECKING:
    from gptoss_plugins.gpt_model.config import GptOssConfig

# Checkpoints name the norms as Transformer Engine's layers do. Megatron's local spec agrees on the
# first, but calls `pre_mlp_layernorm` `mlp.linear_fc1.layer_norm_weight`, even for MoE layers.
CHECKPOINT_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last axis, with a ``weight [hidden]`` that is replicated over TP."""

    def __init__(self, config: GptOssConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        cuda = None if config.use_cpu_initialization else torch.device("cuda")
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=cuda)
        # Megatron sums the gradients of parameters so marked over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def layer_spec(config: GptOssConfig) -> Any:
    """ModuleSpec of one transformer layer."""
    stock = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    spec = copy.deepcopy(stock)
    parts = spec.submodules
    parts.sharded_state_dict_keys_map = dict(CHECKPOINT_NAMES)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.module = GptOssSelfAttention
    parts.self_attention.submodules.core_attention = SinkAttention
    moe = _submodules(parts.mlp)
    moe.router, moe.experts = PlainRouter, GroupedExperts
    return spec


def _submodules(mlp: Any) -> Any:
    """Parts of the MoE layer: a ModuleSpec's (0.16) or a functools.partial's (0.19)."""
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def block_spec(config: GptOssConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (or of its ``vp_stage``-th chunk), and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * layers, layer_norm=RMSNorm)
