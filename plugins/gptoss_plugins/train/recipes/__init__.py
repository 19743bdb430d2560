"""Megatron-Bridge's recipes for GPT-OSS, with its names and values, and tiny ones that run anywhere.

Values are those of ``src/megatron/bridge/recipes/gpt_oss/h100/gpt_oss.py`` at 067f987df (2026-08-22),
and of its ``*_finetune_config`` before b16235863.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_plugins.train.recipes.finetune import (
    gpt_oss_20b_finetune_config,
    gpt_oss_120b_finetune_config,
)
from gptoss_plugins.train.recipes.peft import (
    gpt_oss_20b_peft_config,
    gpt_oss_20b_peft_fp8_current_scaling_config,
    gpt_oss_20b_peft_mxfp8_config,
    gpt_oss_120b_peft_config,
)
from gptoss_plugins.train.recipes.pretrain import (
    gpt_oss_20b_pretrain_config,
    gpt_oss_20b_pretrain_fp8_current_scaling_config,
    gpt_oss_20b_pretrain_mxfp8_config,
    gpt_oss_120b_pretrain_config,
)
from gptoss_plugins.train.recipes.sft import (
    gpt_oss_20b_sft_32k_config,
    gpt_oss_20b_sft_config,
    gpt_oss_20b_sft_fp8_current_scaling_config,
    gpt_oss_20b_sft_mxfp8_config,
    gpt_oss_20b_sft_openmathinstruct2_thinking_packed_config,
    gpt_oss_120b_sft_32k_config,
    gpt_oss_120b_sft_config,
)
from gptoss_plugins.train.recipes.tiny import (
    tiny_peft_config,
    tiny_pretrain_config,
    tiny_sft_config,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptoss_plugins.train.config import TrainingConfig

# In the order of listings; the first line of a docstring is the summary.
RECIPES: tuple[Callable[..., TrainingConfig], ...] = (
    gpt_oss_20b_pretrain_config,
    gpt_oss_20b_pretrain_fp8_current_scaling_config,
    gpt_oss_20b_pretrain_mxfp8_config,
    gpt_oss_20b_sft_config,
    gpt_oss_20b_sft_32k_config,
    gpt_oss_20b_sft_openmathinstruct2_thinking_packed_config,
    gpt_oss_20b_sft_fp8_current_scaling_config,
    gpt_oss_20b_sft_mxfp8_config,
    gpt_oss_20b_peft_config,
    gpt_oss_20b_peft_fp8_current_scaling_config,
    gpt_oss_20b_peft_mxfp8_config,
    gpt_oss_20b_finetune_config,
    gpt_oss_120b_pretrain_config,
    gpt_oss_120b_sft_config,
    gpt_oss_120b_sft_32k_config,
    gpt_oss_120b_peft_config,
    gpt_oss_120b_finetune_config,
    tiny_pretrain_config,
    tiny_sft_config,
    tiny_peft_config,
)

# What every recipe of Megatron-Bridge sets in the environment before CUDA starts.
ENVIRONMENT: Mapping[str, str] = {
    "NCCL_GRAPH_REGISTER": "0",
    "NCCL_NVLS_ENABLE": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "TORCH_NCCL_HIGH_PRIORITY": "1",
}
