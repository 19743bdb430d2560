"""The tokenizer that a config names: its files, which go into checkpoints, and its ends of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.errors import ConfigError
from gptoss_convert.opening import open_source
from gptoss_convert.untrusted import MOST_COMPANION, read_small
from gptoss_plugins.data.byte_level import END, PADDING, SIZE, byte_level_files
from gptoss_plugins.infer.tokenizer import load_tokenizer
from gptoss_plugins.train.run.text import Tokens

if TYPE_CHECKING:
    from gptoss_convert.registry import Registry
    from gptoss_plugins.train.config import TrainingConfig

_OWN = "config.json"  # the run writes the model's own


def tokens_of(config: TrainingConfig, registry: Registry) -> tuple[Tokens, dict[str, bytes]]:
    """What the data's tokens are, and the tokenizer's files: name -> bytes.

    Raises:
        ConvertError: there is no such tokenizer, or it has more tokens than the model.

    """
    wanted = config.tokenizer
    if wanted.tokenizer_type == "ByteLevelTokenizer":
        return Tokens("bytes", SIZE, END, PADDING), byte_level_files()
    if wanted.tokenizer_type == "NullTokenizer":
        size = wanted.vocab_size or config.model.vocab_size
        if size is None:
            raise ConfigError("tokenizer.vocab_size is not set; a NullTokenizer needs it")
        return Tokens("null", size + 1, size, size), {}
    where = wanted.tokenizer_model or config.checkpoint.pretrained_checkpoint
    if where is None:
        raise ConfigError(
            "tokenizer.tokenizer_model is not set; name a folder or hub id with a tokenizer.json, such "
            "as openai/gpt-oss-20b"
        )
    source = open_source(where, registry=registry, headers_only=True)
    tokenizer = load_tokenizer(source.files, where)
    files = {
        name: read_small(path, MOST_COMPANION)
        for name, path in source.files.items()
        if name != _OWN
    }
    if (end := tokenizer.end_of_text) is None:
        raise ConfigError(f"{where}: its tokenizer has no token that ends a text; name another one")
    return Tokens(where, len(tokenizer), end, end), files
