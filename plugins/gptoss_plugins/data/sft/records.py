"""What is wrong with a record, and its texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_NAMES = 12


class BadRecordError(ValueError):
    """A record that no sample can be made of: what is wrong with it, and what to do.

    The sentence goes on from where the record stands: ``has no 'prompt'; ...``.
    """


def text_under(key: str, record: Mapping[str, Any], *, may_be_empty: bool = True) -> str:
    """A field's text.

    Raises:
        BadRecordError: there is none.

    """
    if key not in record:
        names = ", ".join(map(repr, [*record][:_MOST_NAMES])) or "nothing"
        raise BadRecordError(
            f"has no field {key!r}, only {names}; name the fields there are (--prompt-key, "
            f"--completion-key, --messages-key; in a recipe dataset.prompt_key and so on)"
        )
    text = record[key]
    if not isinstance(text, str):
        raise BadRecordError(
            f"has a {key!r} that is no text; write it as text, or say form chat for messages"
        )
    require_utf8(key, text)
    if not text and not may_be_empty:
        raise BadRecordError(f"has an empty {key!r}, so nothing to learn; remove it")
    return text


def require_utf8(key: str, text: str) -> None:
    """Refuse halves of characters, which JSON can write and no tokenizer read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"has a {key!r} with half a surrogate pair at character {error.start}; mend it"
        ) from None


def unfolded(value: Any) -> Any:
    """An object or a list; ``datasets`` keeps those of mixed fields as JSON texts. Others as they are."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value
