"""The samples that a config names, and the files of its tokenizer, which go into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptoss_plugins.train.run.text import text_datasets
from gptoss_plugins.train.run.tokens import tokens_of

if TYPE_CHECKING:
    from gptoss_convert.registry import Registry
    from gptoss_plugins.train.config import TrainingConfig


def datasets_of(config: TrainingConfig, registry: Registry) -> tuple[Any, Any, dict[str, bytes]]:
    """Training and validation samples, None where there are none; files: name -> bytes.

    All ranks call this together.

    Raises:
        ConvertError: data or tokenizer are not there, or do not fit the model.

    """
    tokens, files = tokens_of(config, registry)
    return *text_datasets(config, tokens), files
