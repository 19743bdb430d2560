"""Recipes of a model of 270,000 parameters: minutes on a CPU, in float32.

The distributed optimizer and clipping are off, so that a step is the one of plain AdamW; both can be
turned on.
"""

from __future__ import annotations

import dataclasses

from gptoss_plugins.train.config import (
    NAMED,
    CheckpointConfig,
    LoggerConfig,
    LoRA,
    ModelConfig,
    OptimizerConfig,
    PretrainDataset,
    SchedulerConfig,
    SftDataset,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)

_BASE = TrainingConfig(
    model=ModelConfig(size="tiny", seq_length=128),
    train=TrainConfig(
        train_iters=500, global_batch_size=16, micro_batch_size=8, eval_interval=100, eval_iters=8
    ),
    optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, clip_grad=0.0, use_distributed_optimizer=False),
    scheduler=SchedulerConfig(lr_warmup_iters=20),
    dataset=PretrainDataset(sequence_length=128, split="900,100,0", num_workers=0),
    tokenizer=TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
    checkpoint=CheckpointConfig(save_interval=250),
    mixed_precision=NAMED["fp32"],
)


def tiny_pretrain_config() -> TrainingConfig:
    """Pretraining of a tiny model on bytes, on a CPU."""
    return _BASE


def tiny_sft_config() -> TrainingConfig:
    """Fine-tuning of a tiny model, on a CPU."""
    return dataclasses.replace(
        _BASE,
        dataset=SftDataset(sequence_length=256, num_workers=0),
        logger=LoggerConfig(log_interval=1),
    ).having(
        model={"seq_length": 256, "calculate_per_token_loss": True},
        train={"train_iters": 100, "global_batch_size": 8, "micro_batch_size": 1},
        optimizer={"lr": 5e-4, "min_lr": 0.0, "adam_beta2": 0.98},
        scheduler={"lr_warmup_iters": 10},
        checkpoint={"save_interval": 50},
    )


def tiny_peft_config() -> TrainingConfig:
    """LoRA on a tiny model, on a CPU."""
    return dataclasses.replace(tiny_sft_config(), peft=LoRA(dim=4, alpha=8.0)).having(
        optimizer={"lr": 2e-3}
    )
