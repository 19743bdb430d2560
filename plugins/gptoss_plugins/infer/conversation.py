"""A conversation, turn by turn: what the next prompt is, and what of an answer stays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptoss_plugins.infer.completion import ANALYSIS, COMMENTARY, FINAL, parse
from gptoss_plugins.infer.harmony import render

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gptoss_plugins.infer.completion import Message
    from gptoss_plugins.infer.tokenizer import Tokenizer

FUNCTIONS = "functions."  # the one namespace of tools that templates have a form for


class Conversation:
    """Questions and answers so far.

    Attributes:
        messages: what has been said, as chat templates take it.

    """

    def __init__(
        self, tokenizer: Tokenizer, reasoning: str = "medium", system: str | None = None
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        self._system = system

    def add_user(self, text: str) -> None:
        """The user says something."""
        self.messages.append({"role": "user", "content": text})

    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt for the next answer.

        Raises:
            ConvertError: as :func:`gptoss_plugins.infer.harmony.render`.

        """
        return render(
            self.messages, self._tokenizer, reasoning=self._reasoning, system=self._system
        )

    def add_completion(self, ids: Iterable[int]) -> list[Message]:
        """The model answered; its messages.

        Args:
            ids: of the answer, with the one that ended it, unless it was cut short.

        """
        said = parse(ids, self._tokenizer)
        if turn := turn_of(said):
            self.messages.append(turn)
        return said


def turn_of(said: Sequence[Message]) -> dict[str, Any] | None:
    """An answer as chat templates take it; None, if it is one that they have no form for.

    That is one cut short in its analysis, of which a template would make an empty final answer, and a
    call of a tool that is no function.
    """
    own = [message for message in said if message.role == "assistant"]
    spoken = [message for message in own if message.recipient is None]
    turn: dict[str, Any] = {"role": "assistant"}
    if thinking := _joined(spoken, ANALYSIS):
        turn["thinking"] = thinking
    if own and own[-1].ended_by and (call := _call(own[-1])):
        return {**turn, "tool_calls": [{"type": "function", "function": call}]}
    content = _joined(spoken, FINAL) or _joined(spoken, COMMENTARY)
    return {**turn, "content": content} if content else None


def _joined(messages: Iterable[Message], channel: str) -> str:
    return "\n".join(message.content for message in messages if message.channel == channel)


def _call(message: Message) -> dict[str, Any] | None:
    """The function that a message calls, if it does."""
    _, namespace, name = (message.recipient or "").rpartition(FUNCTIONS)
    if not namespace:
        return None
    try:
        return {"name": name, "arguments": json.loads(message.content)}
    except (ValueError, RecursionError):  # no JSON, as code for a tool may be
        return {"name": name, "arguments": message.content}
