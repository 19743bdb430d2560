"""Samples: token ids, and which of them are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gptoss_convert.errors import ConfigError
from gptoss_plugins.data.sft.conversation import said_in
from gptoss_plugins.data.sft.harmony import Piece, write
from gptoss_plugins.data.sft.records import text_under
from gptoss_plugins.data.sft.system import system_message
from gptoss_plugins.data.sft.turns import samples_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from gptoss_plugins.data.sft.form import Form
    from gptoss_plugins.infer.tokenizer import Tokenizer


class Sample(NamedTuple):
    """What a model reads at once.

    Attributes:
        ids: int32, ``[n]``.
        learned: bool, ``[n]``: whether the model is to produce that token. The first one never is,
            as nothing stands before it.

    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]


def pieces_in(record: Mapping[str, Any], form: Form, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """The samples of a record: one, or for a chat that thinks in several turns one of each.

    None, if nothing of it is to be learned.

    Raises:
        BadRecordError: the record is not of this form.
        ConfigError: the tokenizer has no such control tokens.

    """
    record = form.adapted(record)
    if form.form == "prompt_completion":
        prompt = text_under(form.prompt_key, record)
        completion = text_under(form.completion_key, record, may_be_empty=False)
        end = end_of_completion(tokenizer)
        yield [Piece(prompt, False), Piece(completion, True), Piece(end, True)]
        return
    tools = record.get("tools") or ()
    opening = system_message(form.reasoning_effort, form.conversation_date, has_tools=bool(tools))
    messages = [opening, *said_in(record, form.messages_key, tools)]
    for sample in samples_of(messages, form.loss_channels, form.dropped_channels):
        yield [*write(sample, lambda name: _mark(tokenizer, name))]


def encode(samples: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> Iterator[Sample]:
    """Tokens of samples; each text is encoded by itself, so that none merges with its neighbour."""
    # Headers and the system message are the same in all.
    texts = {piece.content: None for one in samples for piece in one}
    words = [text for text in texts if isinstance(text, str)]
    encoded = dict(zip(words, tokenizer.encode_plain(words), strict=True))
    for pieces in samples:
        ids: list[int] = []
        learned: list[bool] = []
        for content, is_learned in pieces:
            new = [content] if isinstance(content, int) else encoded[content]
            ids += new
            learned += [is_learned] * len(new)
        learned[0] = False
        yield Sample(np.array(ids, np.int32), np.array(learned, np.bool_))


def end_of_completion(tokenizer: Tokenizer) -> int:
    """What generation ends on: the end of a text if it is one of those tokens, else their first.

    Raises:
        ConfigError: there is no such token.

    """
    end, stops = tokenizer.end_of_text, tokenizer.stop_ids
    found = end if end in stops else next(iter(stops), end)
    if found is None:
        raise ConfigError(
            f"{tokenizer.where}: its tokenizer has no token that ends a text; name another one"
        )
    return found


def _mark(tokenizer: Tokenizer, name: str) -> int:
    if (found := tokenizer.id_of(name)) is None:
        raise ConfigError(
            f"{tokenizer.where}: its tokenizer has no {name}, which chats are written with; name one of "
            f"GPT-OSS, or say form=prompt_completion"
        )
    return found
