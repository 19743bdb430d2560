"""``model``: which model, how long its sequences are, and how it is spread over the ranks."""

from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Positive, Rate


@dataclass(frozen=True)
class ModelConfig:
    """The model and its layout. ``gptoss_plugins.train.architecture`` makes a whole config of it.

    Sizes that are null are those of ``size``; set, they make another model (fewer layers, say).

    Attributes:
        size: the published 20b or 120b, or tiny, of 270,000 parameters.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: inner width of an expert.
        num_attention_heads: query heads.
        num_query_groups: key-value heads.
        kv_channels: width of a head.
        num_moe_experts: experts of a layer.
        moe_router_topk: experts that a token goes through.
        vocab_size: rows of the embedding.
        max_position_embeddings: tokens, the longest sequence that the checkpoint claims to take.
        seq_length: tokens of a training sequence.
        tensor_model_parallel_size: ranks that share each matrix (TP).
        pipeline_model_parallel_size: stages that share the layers (PP).
        virtual_pipeline_model_parallel_size: model chunks per stage (VPP); null for one.
        expert_model_parallel_size: ranks that share the experts (EP).
        expert_tensor_parallel_size: ranks that share each expert (ETP). megatron-core computes no
            experts with biases so; only 1 works.
        context_parallel_size: ranks that share each sequence (CP).
        sequence_parallel: split activations along the sequence between TP ranks; on with TP, off
            without.
        cp_comm_type: how CP ranks exchange attention; sinks need all-to-all over the heads.
        calculate_per_token_loss: average the loss over all tokens of a global batch alike; else
            over those of each microbatch first.
        cross_entropy_loss_fusion: take the loss over the vocabulary in chunks, without a whole
            tensor of float32 logits.
        recompute_granularity: full recomputes whole layers in the backward pass, selective the
            ``recompute_modules``; null keeps all activations.
        recompute_method: of full: uniform recomputes all layers in groups, block the first ones of
            a stage.
        recompute_num_layers: of full: layers of a group (uniform), or how many layers (block).
        recompute_modules: of selective: parts of a layer; null for core_attn.
        moe_router_load_balancing_type: aux_loss adds a loss that evens out the experts' load.
        moe_aux_loss_coeff: weight of that loss.
        moe_router_padding_for_fp8: pad each expert's tokens to a multiple that FP8 products take.

    """

    size: Literal["20b", "120b", "tiny"] = "20b"
    num_layers: Positive | None = None
    hidden_size: Positive | None = None
    ffn_hidden_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_query_groups: Positive | None = None
    kv_channels: Positive | None = None
    num_moe_experts: Positive | None = None
    moe_router_topk: Positive | None = None
    vocab_size: Positive | None = None
    max_position_embeddings: Positive | None = None
    seq_length: Positive = 4096
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: Positive | None = None
    expert_model_parallel_size: Positive = 1
    expert_tensor_parallel_size: Positive = 1
    context_parallel_size: Positive = 1
    sequence_parallel: bool = False
    cp_comm_type: Literal["a2a"] = "a2a"
    calculate_per_token_loss: bool = False
    cross_entropy_loss_fusion: bool = True
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Positive | None = None
    recompute_modules: tuple[Literal["core_attn", "moe_act", "layernorm", "moe"], ...] | None = None
    moe_router_load_balancing_type: Literal["none", "aux_loss"] = "none"
    moe_aux_loss_coeff: Rate = 0.9
    moe_router_padding_for_fp8: bool = False
