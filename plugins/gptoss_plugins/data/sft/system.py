"""Harmony's system message, as openai_harmony writes it."""

from __future__ import annotations

import datetime

from gptoss_plugins.data.sft.harmony import Said


def system_message(effort: str, date: str | None, *, has_tools: bool) -> Said:
    """Who the model is, how much it is to think, which channels it has.

    Args:
        effort: low, medium or high.
        date: of the conversation; no line of it without. Today's would make other data of the same
            file every day.
        has_tools: whether functions can be called.

    """
    lines = [
        "You are ChatGPT, a large language model trained by OpenAI.",
        "Knowledge cutoff: 2024-06",
        *([f"Current date: {date}"] if date else []),
        "",
        f"Reasoning: {effort}",
        "",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
        *(
            ["Calls to these tools must go to the commentary channel: 'functions'."]
            if has_tools
            else []
        ),
    ]
    return Said("system", "\n".join(lines))


def is_date(text: str) -> bool:
    """Whether a text is a day, written as ``2025-08-05``."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
