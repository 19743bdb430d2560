"""The names that Megatron-Bridge's README has: one recipe for adapters and for all weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gptoss_plugins.train.overrides import adapters
from gptoss_plugins.train.recipes.peft import gpt_oss_20b_peft_config, gpt_oss_120b_peft_config
from gptoss_plugins.train.recipes.sft import gpt_oss_20b_sft_config, gpt_oss_120b_sft_config

if TYPE_CHECKING:
    from gptoss_plugins.train.config import LoRA, TrainingConfig


def gpt_oss_20b_finetune_config(peft: LoRA | str | None = "lora") -> TrainingConfig:
    """The PEFT recipe of 20B; with peft=null the SFT recipe."""
    if (lora := adapters(peft)) is None:
        return gpt_oss_20b_sft_config()
    return dataclasses.replace(gpt_oss_20b_peft_config(), peft=lora)


def gpt_oss_120b_finetune_config(peft: LoRA | str | None = "lora") -> TrainingConfig:
    """The PEFT recipe of 120B; with peft=null the SFT recipe."""
    if (lora := adapters(peft)) is None:
        return gpt_oss_120b_sft_config()
    return dataclasses.replace(gpt_oss_120b_peft_config(), peft=lora)
