"""Messages in OpenAI's form -> what is said in harmony.

An assistant's ``thinking`` (or ``reasoning_content``) becomes a message of the channel analysis before
its ``content``, which is final unless ``channel`` names another one; each of its ``tool_calls`` one of
commentary to that function. What stands beside a call is thinking if there is no other, as in the
published chat template, else words to the user before it. ``"weight": 0`` keeps a message from being
learned. Instructions, of system or developer, become developer messages.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptoss_plugins.data.sft.harmony import ASSISTANT, Said
from gptoss_plugins.data.sft.records import BadRecordError, require_utf8, unfolded
from gptoss_plugins.data.sft.tools import describe_tools
from gptoss_plugins.infer.completion import ANALYSIS, COMMENTARY, FINAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_CHANNELS = (ANALYSIS, COMMENTARY, FINAL)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_THINKING = ("thinking", "reasoning_content", "reasoning")


def said_in(record: Mapping[str, Any], key: str, tools: Any) -> list[Said]:
    """The messages of a record.

    Args:
        record: of a chat.
        key: its field that has the messages.
        tools: functions that can be called, in OpenAI's form.

    Raises:
        BadRecordError: a message that harmony has no form for, or none that could be learned.

    """
    messages = unfolded(record.get(key))
    if not isinstance(messages, list | tuple) or not messages:
        names = ", ".join(map(repr, record)) or "nothing"
        raise BadRecordError(
            f"has no list of messages under {key!r}, only {names}; name the field with --messages-key "
            f"(dataset.messages_key), or say form prompt_completion"
        )
    found: list[Said] = []
    functions: dict[str, str] = {}
    for number, message in enumerate(map(unfolded, messages)):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise BadRecordError(
                f"message {number} has the role {role!r}; say one of {', '.join(_ROLES)}"
            )
        found += _said(message, f"message {number}", found, functions)
    if not any(message.author == ASSISTANT for message in found):
        raise BadRecordError("has no message of the assistant, so nothing to learn; remove it")
    return _with_tools(found, describe_tools(tools))


def _with_tools(messages: list[Said], tools: str) -> list[Said]:
    """Functions are told in the developer's first message, at the top."""
    if not tools:
        return messages
    first = messages[0]
    if first.author != "developer":
        return [Said("developer", tools), *messages]
    return [Said("developer", f"{first.content}\n\n{tools}"), *messages[1:]]


def _said(
    message: Mapping[str, Any], place: str, before: Sequence[Said], functions: dict[str, str]
) -> Iterator[Said]:
    role, content = message["role"], _text(message, "content", place)
    if role in ("system", "developer"):
        if content:
            yield Said("developer", f"# Instructions\n\n{content}")
    elif role == "user":
        yield Said("user", content)
    elif role == "tool":
        author, channel = _answering(message, place, before, functions)
        yield Said(author, content, channel, ASSISTANT)
    else:
        yield from _assistant(message, content, place, functions)


def _assistant(
    message: Mapping[str, Any], content: str, place: str, functions: dict[str, str]
) -> Iterator[Said]:
    learned = message.get("weight") not in (0, False)
    thinking = next((text for key in _THINKING if (text := _text(message, key, place))), "")
    calls = unfolded(message.get("tool_calls")) or ()
    if calls and content and not thinking:
        thinking, content = content, ""
    if not (thinking or content or calls):
        raise BadRecordError(f"{place} of the assistant is empty; write an answer, or remove it")
    if thinking:
        yield Said(ASSISTANT, thinking, ANALYSIS, learned=learned)
    channel = message.get("channel") or (COMMENTARY if calls else FINAL)
    if channel not in _CHANNELS:
        raise BadRecordError(
            f"{place} has the channel {channel!r}; say one of {', '.join(_CHANNELS)}"
        )
    if content:
        recipient = _text(message, "recipient", place) or None
        kind = (_text(message, "content_type", place) or "json") if recipient else None
        yield Said(ASSISTANT, content, channel, recipient, kind, learned)
    if calls:
        name, arguments = _call(calls, place, functions)
        yield Said(ASSISTANT, arguments, COMMENTARY, name, "json", learned)


def _call(calls: Any, place: str, functions: dict[str, str]) -> tuple[str, str]:
    """Name and arguments of the one call; ``functions`` learns its id."""
    if not isinstance(calls, list | tuple) or len(calls) != 1:
        raise BadRecordError(
            f"{place} has several tool_calls, where harmony makes one at a time; write each as a message "
            f"of its own, followed by its result"
        )
    first = unfolded(calls[0])
    first = first if isinstance(first, dict) else {}
    call = unfolded(first.get("function", first))
    call = call if isinstance(call, dict) else {}
    name, arguments = call.get("name"), call.get("arguments", "{}")
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"{place} has a tool call without the name of a function; name it")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    require_utf8("arguments", arguments)
    author = name if "." in name else f"functions.{name}"
    if isinstance(number := first.get("id"), str):
        functions[number] = author
    return author, arguments


def _answering(
    message: Mapping[str, Any], place: str, before: Sequence[Said], functions: Mapping[str, str]
) -> tuple[str, str]:
    """Which tool answers, and on which channel: that of the call."""
    call = next((said for said in reversed(before) if said.is_call), None)
    name = message.get("name")
    if isinstance(name, str) and name:
        author = name if "." in name else f"functions.{name}"
    elif known := functions.get(str(message.get("tool_call_id"))):
        author = known
    elif call and call.recipient:
        author = call.recipient
    else:
        raise BadRecordError(f"{place} is of a tool that was not called; name it under 'name'")
    return author, (call and call.channel) or COMMENTARY


def _text(message: Mapping[str, Any], key: str, place: str) -> str:
    """A text, or OpenAI's list of parts that are texts; nothing for null."""
    found = message.get(key)
    if found is None:
        return ""
    if isinstance(found, list | tuple) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in found
    ):
        found = "".join(part["text"] for part in found)
    if isinstance(found, dict) and message["role"] == "tool":
        found = json.dumps(found, ensure_ascii=False)
    if not isinstance(found, str):
        raise BadRecordError(f"{place} has a {key} that is no text; write it as text")
    require_utf8(key, found)
    return found
