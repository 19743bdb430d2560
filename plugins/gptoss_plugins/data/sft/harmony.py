"""What is said, written as harmony: which of its tokens the model has to produce itself.

The form is that of https://github.com/openai/harmony/blob/main/docs/format.md, to the token what
openai_harmony renders for training (tests/plugins/test_sft_harmony.py). Control tokens come from here
alone: one that is written out in a text stays text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gptoss_plugins.infer.completion import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    FINAL,
    MESSAGE,
    RETURN,
    START,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Said:
    """One message.

    Attributes:
        author: system, developer, user, assistant, or a tool by its name, as ``functions.weather``.
        content: the text.
        channel: analysis, commentary or final; None for those who have none.
        recipient: the tool that is called, or ``assistant``, to which a tool answers.
        content_type: of a call, such as ``json``.
        learned: whether the model is to say so.

    """

    author: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    learned: bool = False

    @property
    def is_call(self) -> bool:
        """Whether the model stops here for a tool to answer."""
        return self.author == ASSISTANT and self.recipient not in (None, "all")

    @property
    def is_answer(self) -> bool:
        """Whether the model stops here for good."""
        return self.author == ASSISTANT and self.channel == FINAL and not self.is_call


class Piece(NamedTuple):
    """A part of a sample.

    Attributes:
        content: a text, or the id of a token.
        learned: whether its tokens are.

    """

    content: str | int
    learned: bool


def write(messages: Sequence[Said], mark: Callable[[str], int]) -> Iterator[Piece]:
    """Pieces of a conversation, in order.

    Of a message that is learned, these tokens are: ``<|start|>assistant`` only where the model goes
    on by itself after another message of its own (else the prompt ends with it); the rest of the
    header; the content; the token that ends it. The one exception is the ``<|end|>`` of a final answer
    that others follow: when that was generated, ``<|return|>`` stood there.

    Args:
        messages: of which the last one ends with ``<|return|>``, if it is a final answer.
        mark: the id of a control token.

    """
    goes_on = False
    for number, message in enumerate(messages):
        is_last = number == len(messages) - 1
        learned = message.learned
        yield Piece(mark(START), learned and goes_on)
        yield Piece(message.author, learned and goes_on)
        if message.recipient:
            yield Piece(f" to={message.recipient}", learned)
        if message.channel:
            yield Piece(mark(CHANNEL), learned)
            yield Piece(message.channel, learned)
        if message.content_type:
            yield Piece(" ", learned)
            yield Piece(mark(CONSTRAIN), learned)
            yield Piece(message.content_type, learned)
        yield Piece(mark(MESSAGE), learned)
        yield Piece(message.content, learned)
        end = CALL if message.is_call else RETURN if message.is_answer and is_last else END
        yield Piece(mark(end), learned and (end != END or not message.is_answer))
        goes_on = message.author == ASSISTANT and not message.is_call and not message.is_answer
