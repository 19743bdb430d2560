"""Functions that the model may call, as harmony tells them: in the manner of TypeScript."""

from __future__ import annotations

from typing import Any

from gptoss_plugins.data.sft.records import BadRecordError


def describe_tools(tools: Any) -> str:
    """The part of a developer message about functions; empty, if there are none.

    Args:
        tools: in OpenAI's form, ``[{"type": "function", "function": {...}}]``.

    """
    if tools:
        raise BadRecordError("has tools, which are not written yet; remove them")
    return ""
