"""Fine-tuning of adapters (LoRA): the SFT recipes at a higher learning rate, on fewer ranks."""

from __future__ import annotations

import dataclasses

from gptoss_plugins.train.config import LoRA, TrainingConfig
from gptoss_plugins.train.recipes.formats import in_fp8_current_scaling, in_mxfp8
from gptoss_plugins.train.recipes.sft import gpt_oss_20b_sft_config, gpt_oss_120b_sft_config


def _lora(config: TrainingConfig, expert_parallel: int) -> TrainingConfig:
    return dataclasses.replace(config, peft=LoRA()).having(
        model={
            "pipeline_model_parallel_size": 1,
            "expert_model_parallel_size": expert_parallel,
        },
        optimizer={"lr": 1e-4},
    )


def gpt_oss_20b_peft_config() -> TrainingConfig:
    """LoRA on 20B, on SQuAD."""
    return _lora(gpt_oss_20b_sft_config(), 1)


def gpt_oss_20b_peft_fp8_current_scaling_config() -> TrainingConfig:
    """LoRA on 20B in FP8, scaled by tensor (Hopper)."""
    return in_fp8_current_scaling(gpt_oss_20b_peft_config())


def gpt_oss_20b_peft_mxfp8_config() -> TrainingConfig:
    """LoRA on 20B in MXFP8 (Blackwell)."""
    return in_mxfp8(gpt_oss_20b_peft_config())


def gpt_oss_120b_peft_config() -> TrainingConfig:
    """LoRA on 120B, on SQuAD."""
    return _lora(gpt_oss_120b_sft_config(), 8)
