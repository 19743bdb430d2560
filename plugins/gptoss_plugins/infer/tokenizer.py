"""A checkpoint's tokenizer: text to token ids and back, the ids that end a text, its chat template.

Read by transformers from named files of the checkpoint. Nothing is fetched, and no code of the
checkpoint is run but its chat template, in the sandbox that transformers keeps for those.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from gptoss_convert.errors import CheckpointError, ConfigError, UsageError
from gptoss_convert.untrusted import MOST_COMPANION, read_small
from gptoss_plugins.huggingface.headers import read_json
from gptoss_plugins.infer.bytelevel import Detokenizer, bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

VOCABULARY = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
_MOST_TEMPLATE = 4 << 20  # bytes; OpenAI's takes 17 kB
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # what templates may write


class Tokenizer:
    """Made by :func:`load_tokenizer`.

    Attributes:
        where: the checkpoint, for messages.
        stop_ids: the tokens that end a completion; none if the checkpoint names none.
        has_chat_template: whether :meth:`chat_ids` can be asked.

    """

    def __init__(self, inner: Any, where: str, stop_ids: tuple[int, ...]) -> None:
        self._inner = inner
        self._added = inner.added_tokens_decoder
        self._ids = {str(token): number for number, token in self._added.items()}
        self.where = where
        self.stop_ids = stop_ids
        self.has_chat_template = inner.chat_template is not None

    def __len__(self) -> int:
        """Tokens there are; the model's embedding may have more rows."""
        return len(self._inner)

    def id_of(self, special: str) -> int | None:
        """The id of an added token such as ``<|start|>``, if there is one."""
        return self._ids.get(special)

    @property
    def end_of_text(self) -> int | None:
        """The token between documents: ``<|endoftext|>``, as ``<|return|>``, GPT-OSS's eos, ends answers
        only; else the first that ends a completion.
        """
        found = self.id_of("<|endoftext|>")
        return found if found is not None else next(iter(self.stop_ids), None)

    def vocabulary(self) -> dict[str, int]:
        """The BPE vocabulary, added tokens apart: spelling -> id."""
        found: dict[str, int] = self._inner.backend_tokenizer.get_vocab(with_added_tokens=False)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as transformers gives them: special tokens in it are special tokens."""
        ids: list[int] = self._inner(require_text(text))["input_ids"]
        return ids

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself; special tokens that it writes out are text like any other."""
        backend = self._inner.backend_tokenizer
        backend.encode_special_tokens = True  # encode() sets it back by itself
        found = backend.encode_batch([*map(require_text, texts)], add_special_tokens=False)
        return [one.ids for one in found]

    @cached_property
    def digest(self) -> str:
        """Checksum of what each id stands for: of two tokenizers that have the same, the ids of one
        are the text of the other.
        """
        words = self._inner.backend_tokenizer.get_vocab(with_added_tokens=True)
        lines = "".join(f"{number} {word!r}\n" for word, number in sorted(words.items()))
        return xxh3_128(lines.encode()).hexdigest()

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing, if it is special or no token at all."""
        if added := self._added.get(token):
            return b"" if added.special else str(added).encode()
        piece = self._inner.convert_ids_to_tokens(token) if 0 <= token < 1 << 31 else None
        return bytes_of(piece) if piece else b""

    def stream(self) -> Detokenizer:
        """For the ids of one text, as they come."""
        return Detokenizer(self.token_bytes)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Prompt for the next answer, by the chat template: ``apply_chat_template``'s ids.

        Args:
            messages: as the template takes them.
            variables: what else it takes, such as ``reasoning_effort``.

        Raises:
            CheckpointError: the template fails.

        """
        try:
            found: list[int] = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **variables,
            )
        except Exception as error:  # a template may raise anything
            raise CheckpointError(
                f"{self.where}: its chat template refuses this conversation ({error}); begin another "
                f"one, or replace {TEMPLATE}"
            ) from error
        return found


def load_tokenizer(files: Mapping[str, Path], where: str) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        files: the checkpoint's companions: name -> file.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: there is no tokenizer, or it is damaged, or of another kind.

    """
    if (path := files.get(VOCABULARY)) is None:
        raise CheckpointError(
            f"{where}: has no {VOCABULARY}; put that of openai/gpt-oss-20b and its "
            f"tokenizer_config.json beside the weights (a Megatron checkpoint keeps them in "
            f"iter_*/tokenizer), or name the Hugging Face checkpoint, too"
        )
    if not importlib.util.find_spec("transformers"):
        raise ConfigError(
            "text needs a tokenizer, and transformers is not installed: "
            "pip install 'gptoss-convert[chat]'"
        )
    read_small(path, MOST_COMPANION)  # a plain file, and not endless
    settings = _json(files, "tokenizer_config.json")
    inner = _open(path, _template(files, settings))
    names = {**_json(files, "special_tokens_map.json"), **settings}
    for name in _NAMED:
        token = _content(names.get(name))
        # One the vocabulary lacks would be added to it, with an id that the model has no row for.
        if token is not None and inner.convert_tokens_to_ids(token) is not None:
            setattr(inner, name, token)
    return Tokenizer(inner, where, _stop_ids(files, inner))


def require_text(text: str) -> str:
    """The text; UsageError if it holds what no UTF-8 says, as arguments in another encoding do."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is no valid UTF-8 at character {error.start}; write it in UTF-8"
        ) from None
    return text


def _open(path: Path, template: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        inner = PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template)
    except BaseException as error:  # the parser is Rust: its panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(
            f"{path}: is no tokenizer that transformers can read ({error}); fetch it again"
        ) from None
    kind = type(inner.backend_tokenizer.decoder).__name__
    if kind != "ByteLevel":
        raise CheckpointError(
            f"{path}: decodes by {kind}, where GPT-OSS's tokenizer does by ByteLevel; fetch that of "
            f"openai/gpt-oss-20b"
        )
    return inner


def _template(files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    """A file of its own before the one in the tokenizer's config, as in transformers."""
    if path := files.get(TEMPLATE):
        try:
            return read_small(path, _MOST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: is no UTF-8 text ({error}); fetch it again") from None
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        try:
            return {one["name"]: one["template"] for one in found}
        except (TypeError, KeyError):
            found = False
    if not isinstance(found, str | None):
        raise CheckpointError(
            f"{files['tokenizer_config.json']}: its chat_template is no text; fetch it again"
        )
    return found


def _stop_ids(files: Mapping[str, Path], inner: Any) -> tuple[int, ...]:
    """What ends a text: by generation_config.json, else the tokenizer, else the model's config."""
    stated = {name: _eos(files, name) for name in ("generation_config.json", "config.json")}
    own = () if inner.eos_token_id is None else (inner.eos_token_id,)
    return stated["generation_config.json"] or own or stated["config.json"]


def _eos(files: Mapping[str, Path], name: str) -> tuple[int, ...]:
    found = _json(files, name).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise CheckpointError(
            f"{files[name]}: eos_token_id is {found!r}, where token ids belong; fetch it again"
        )
    return tuple(dict.fromkeys(ids))


def _content(token: Any) -> str | None:
    """A special token's text; files have it alone or with its settings."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(files[name]) if name in files else {}
    return found
