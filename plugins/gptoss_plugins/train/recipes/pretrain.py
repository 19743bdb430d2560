"""Pretraining: random tokens until ``dataset.blend`` is set."""

from __future__ import annotations

from gptoss_plugins.train.config import (
    DdpConfig,
    ModelConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)
from gptoss_plugins.train.recipes.formats import in_fp8_current_scaling, in_mxfp8

_BASE = TrainingConfig(
    model=ModelConfig(
        seq_length=4096,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=4,
        sequence_parallel=True,
        calculate_per_token_loss=True,
    ),
    train=TrainConfig(
        train_iters=1_000_000,
        global_batch_size=512,
        micro_batch_size=1,
        eval_interval=2000,
        eval_iters=32,
        manual_gc=True,
        manual_gc_interval=100,
    ),
    scheduler=SchedulerConfig(lr_warmup_iters=2000),
    ddp=DdpConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=32000),
)


def gpt_oss_20b_pretrain_config() -> TrainingConfig:
    """Pretraining of 20B in bf16."""
    return _BASE


def gpt_oss_20b_pretrain_fp8_current_scaling_config() -> TrainingConfig:
    """Pretraining of 20B in FP8, scaled by tensor (Hopper)."""
    return in_fp8_current_scaling(_BASE)


def gpt_oss_20b_pretrain_mxfp8_config() -> TrainingConfig:
    """Pretraining of 20B in MXFP8 (Blackwell)."""
    return in_mxfp8(_BASE)


def gpt_oss_120b_pretrain_config() -> TrainingConfig:
    """Pretraining of 120B in bf16."""
    return _BASE.having(model={"size": "120b", "expert_model_parallel_size": 16})
