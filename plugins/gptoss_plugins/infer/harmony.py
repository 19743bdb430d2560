"""Harmony, the chat format that GPT-OSS was trained on: prompts into token ids, answers out of them.

A prompt is rendered by the checkpoint's own chat template; a checkpoint that has none is served by
openai_harmony, where that is installed. Answers are read by :mod:`gptoss_plugins.infer.completion`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import ConfigError, UsageError
from gptoss_plugins.infer.completion import CALL, RETURN, ROLES, Delta, Message, Parser, parse
from gptoss_plugins.infer.tokenizer import require_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptoss_plugins.infer.tokenizer import Tokenizer

__all__ = ["EFFORTS", "Delta", "Message", "Parser", "parse", "render", "stop_ids"]

EFFORTS = ("low", "medium", "high")


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    reasoning: str = "medium",
    system: str | None = None,
) -> list[int]:
    """Prompt for the next answer; it ends with ``<|start|>assistant``.

    The ids are those of transformers' ``apply_chat_template``, down to special tokens that are written
    out in a message: they are special tokens. To openai_harmony they are text.

    Args:
        messages: a ``role`` (user, assistant; first of all also system or developer) and a ``content``
            each; an assistant's may have ``thinking``, and ``tool_calls`` in place of content. Which
            thinking the model sees again is the template's decision: none, once an answer is final.
        tokenizer: of the checkpoint.
        reasoning: low, medium or high.
        system: instructions, as a message of their own before all others. Harmony's system message
            is made by the template; these become its developer message.

    Raises:
        UsageError: a conversation that harmony has no form for.
        ConfigError: there is neither a template nor openai_harmony.
        CheckpointError: the template fails, or is missing and the vocabulary is not GPT-OSS's.

    """
    said = [{"role": "system", "content": system}] if system else []
    said += [dict(message) for message in messages]
    _require_form(said, reasoning)
    if tokenizer.has_chat_template:
        return tokenizer.chat_ids(said, reasoning_effort=reasoning)
    if not importlib.util.find_spec("openai_harmony"):
        raise ConfigError(
            f"{tokenizer.where}: has no chat_template.jinja; put that of openai/gpt-oss-20b beside "
            f"its tokenizer.json, or pip install 'gptoss-convert[chat]' for openai-harmony"
        )
    from gptoss_plugins.infer.openai_library import render_by_library

    return render_by_library(said, tokenizer, reasoning)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the checkpoint's own stop ids, and harmony's two, stated or not."""
    own = [number for mark in (RETURN, CALL) if (number := tokenizer.id_of(mark)) is not None]
    return tuple(dict.fromkeys([*tokenizer.stop_ids, *own]))


def _require_form(messages: Sequence[Mapping[str, Any]], reasoning: str) -> None:
    if reasoning not in EFFORTS:
        raise UsageError(f"reasoning is {reasoning!r}; say one of {', '.join(EFFORTS)}")
    if not messages:
        raise UsageError("the conversation is empty; say something")
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(
                f"message {number} has the role {role!r}; say one of {', '.join(ROLES)}"
            )
        if number and role in ("system", "developer"):
            # Templates would leave it out without a word.
            raise UsageError(f"message {number} is for the {role}; only the first one may be")
        for key in ("content", "thinking"):
            if not isinstance(text := message.get(key, ""), str):
                raise UsageError(f"message {number} has a {key} that is no text; write it as text")
            require_text(text)
