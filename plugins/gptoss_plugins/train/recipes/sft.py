"""Fine-tuning of all weights: SQuAD, packed, until ``dataset`` says otherwise."""

from __future__ import annotations

from gptoss_plugins.train.config import (
    CheckpointConfig,
    DdpConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    RngConfig,
    SchedulerConfig,
    SftDataset,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)
from gptoss_plugins.train.recipes.formats import in_fp8_current_scaling, in_mxfp8

_BASE = TrainingConfig(
    model=ModelConfig(seq_length=2048, expert_model_parallel_size=8),
    train=TrainConfig(
        train_iters=1000, global_batch_size=128, micro_batch_size=1, eval_interval=50, eval_iters=32
    ),
    optimizer=OptimizerConfig(lr=5e-6, min_lr=0.0, adam_beta2=0.98),
    scheduler=SchedulerConfig(lr_warmup_iters=50),
    ddp=DdpConfig(grad_reduce_in_fp32=False),
    dataset=SftDataset(sequence_length=2048),
    tokenizer=TokenizerConfig(tokenizer_model="openai/gpt-oss-20b"),
    checkpoint=CheckpointConfig(save_interval=250),
    logger=LoggerConfig(log_interval=1),
    rng=RngConfig(seed=5678),
)
_LONG = 32768  # tokens


def gpt_oss_20b_sft_config() -> TrainingConfig:
    """Fine-tuning of 20B on SQuAD."""
    return _BASE


def gpt_oss_20b_sft_32k_config() -> TrainingConfig:
    """Fine-tuning of 20B on packs of 32,768 tokens."""
    return _BASE.having(
        model={"seq_length": _LONG},
        dataset={"sequence_length": _LONG},
        train={"global_batch_size": 32},
    )


def gpt_oss_20b_sft_openmathinstruct2_thinking_packed_config() -> TrainingConfig:
    """Fine-tuning of 20B on OpenMathInstruct-2, thinking included."""
    return _BASE.having(
        model={"seq_length": 4096},
        dataset={
            "sequence_length": 4096,
            "dataset_name": "openmathinstruct2_thinking",
            "form": "chat",
            "val_proportion": 0.05,
        },
    )


def gpt_oss_20b_sft_fp8_current_scaling_config() -> TrainingConfig:
    """Fine-tuning of 20B in FP8, scaled by tensor (Hopper)."""
    return in_fp8_current_scaling(_BASE)


def gpt_oss_20b_sft_mxfp8_config() -> TrainingConfig:
    """Fine-tuning of 20B in MXFP8 (Blackwell)."""
    return in_mxfp8(_BASE).having(
        mixed_precision={"fp8_param_gather": False, "reuse_grad_buf_for_mxfp8_param_ag": False}
    )


def gpt_oss_120b_sft_config() -> TrainingConfig:
    """Fine-tuning of 120B on SQuAD."""
    return _BASE.having(
        model={"size": "120b", "pipeline_model_parallel_size": 4},
        tokenizer={"tokenizer_model": "openai/gpt-oss-120b"},
    )


def gpt_oss_120b_sft_32k_config() -> TrainingConfig:
    """Fine-tuning of 120B on packs of 32,768 tokens, each on four ranks."""
    return gpt_oss_120b_sft_config().having(
        model={
            "seq_length": _LONG,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 6,
            "expert_model_parallel_size": 4,
            "context_parallel_size": 4,
            "sequence_parallel": True,
            "calculate_per_token_loss": True,
            "cross_entropy_loss_fusion": False,
            "recompute_granularity": "selective",
            "recompute_modules": ("moe_act",),
        },
        dataset={"sequence_length": _LONG, "pad_seq_to_mult": 8},
        train={"global_batch_size": 4},
    )
