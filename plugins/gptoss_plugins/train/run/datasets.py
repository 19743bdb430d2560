"""The samples that a config names, and the files of its tokenizer, which go into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gptoss_plugins.data.sft import prepare, sft_datasets
from gptoss_plugins.train.run.text import text_datasets
from gptoss_plugins.train.run.tokens import tokenizer_of, tokens_of

if TYPE_CHECKING:
    from gptoss_convert.registry import Registry
    from gptoss_plugins.train.config import TrainingConfig


def datasets_of(config: TrainingConfig, registry: Registry) -> tuple[Any, Any, dict[str, bytes]]:
    """Training and validation samples, None where there are none; files: name -> bytes.

    All ranks call this together.

    Raises:
        ConvertError: data or tokenizer are not there, or do not fit the model.

    """
    if config.dataset.kind == "pretrain":
        tokens, files = tokens_of(config, registry)
        return *text_datasets(config, tokens), files
    with tokenizer_of(config, registry) as (tokenizer, files):
        if dist.get_rank() == 0:
            prepare(config.dataset, tokenizer)
        dist.barrier()
        return *sft_datasets(config.dataset, tokenizer), files
