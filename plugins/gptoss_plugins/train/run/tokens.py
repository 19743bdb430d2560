"""The tokenizer that a config names, its files, which go into checkpoints, and its ends of text."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gptoss_convert.errors import ConfigError
from gptoss_convert.opening import open_source
from gptoss_convert.untrusted import MOST_COMPANION, read_small
from gptoss_plugins.data.byte_level import END, PADDING, SIZE, byte_level_files
from gptoss_plugins.infer.tokenizer import load_tokenizer
from gptoss_plugins.train.architecture import megatron_fields
from gptoss_plugins.train.run.text import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptoss_convert.registry import Registry
    from gptoss_plugins.infer.tokenizer import Tokenizer
    from gptoss_plugins.train.config import TrainingConfig

_OWN = "config.json"  # the run writes the model's own
_BYTES = "the byte-level tokenizer"


def tokens_of(config: TrainingConfig, registry: Registry) -> tuple[Tokens, dict[str, bytes]]:
    """What the tokens of running text are, and the tokenizer's files: name -> bytes.

    Raises:
        ConvertError: there is no such tokenizer, or it has more tokens than the model.

    """
    wanted = config.tokenizer
    if wanted.tokenizer_type == "ByteLevelTokenizer":
        _require_room(SIZE, config, _BYTES)
        return Tokens("bytes", SIZE, END, PADDING), byte_level_files()
    if wanted.tokenizer_type == "NullTokenizer":
        size = wanted.vocab_size or config.model.vocab_size
        if size is None:
            raise ConfigError("tokenizer.vocab_size is not set; a NullTokenizer needs it")
        _require_room(size + 1, config, "the NullTokenizer, with its end of documents")
        return Tokens("null", size + 1, size, size), {}
    tokenizer, files = _read(config, registry)
    if (end := tokenizer.end_of_text) is None:
        raise ConfigError(
            f"{tokenizer.where}: its tokenizer has no token that ends a text; name another one"
        )
    return Tokens(tokenizer.where, len(tokenizer), end, end), files


@contextmanager
def tokenizer_of(
    config: TrainingConfig, registry: Registry
) -> Iterator[tuple[Tokenizer, dict[str, bytes]]]:
    """The tokenizer for questions and answers, and its files: name -> bytes.

    Raises:
        ConvertError: as above, or the config's takes no text.

    """
    kind = config.tokenizer.tokenizer_type
    if kind == "NullTokenizer":
        raise ConfigError(
            "tokenizer.tokenizer_type is NullTokenizer, which takes no text; say HuggingFaceTokenizer"
        )
    if kind == "HuggingFaceTokenizer":
        yield _read(config, registry)
        return
    _require_room(SIZE, config, _BYTES)
    with TemporaryDirectory(prefix="gptoss-convert-bytes-") as folder:
        files = byte_level_files()
        paths = {name: Path(folder) / name for name in files}
        for name, data in files.items():
            paths[name].write_bytes(data)
        yield load_tokenizer(paths, _BYTES), files


def _read(config: TrainingConfig, registry: Registry) -> tuple[Tokenizer, dict[str, bytes]]:
    where = config.tokenizer.tokenizer_model or config.checkpoint.pretrained_checkpoint
    if where is None:
        raise ConfigError(
            "tokenizer.tokenizer_model is not set; name a folder or hub id with a tokenizer.json, such "
            "as openai/gpt-oss-20b"
        )
    source = open_source(where, registry=registry, headers_only=True)
    tokenizer = load_tokenizer(source.files, where)
    _require_room(len(tokenizer), config, f"{where}: its tokenizer")
    return tokenizer, _contents(source.files)


def _contents(files: Mapping[str, Path]) -> dict[str, bytes]:
    return {name: read_small(path, MOST_COMPANION) for name, path in files.items() if name != _OWN}


def _require_room(tokens: int, config: TrainingConfig, what: str) -> None:
    if tokens > (rows := megatron_fields(config.model)["vocab_size"]):
        raise ConfigError(
            f"{what} has {tokens} tokens, and the model {rows}; name the model's own tokenizer"
        )
