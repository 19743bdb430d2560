"""Records of files, each with the place to name when it is bad."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.data.units import PARQUET, lines_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptoss_plugins.data.units import Unit

_MOST_NAMES = 12


class BadRecordError(ValueError):
    """A record that no sample can be made of: what is wrong with it, and what to do.

    The sentence goes on from where the record stands: ``has no 'prompt'; ...``.
    """


def records_in(unit: Unit) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of a unit, and where it stands, for :func:`place_of`; empty lines are none.

    Raises:
        CheckpointError: a line is no JSON object.
        ConfigError: the package that reads such files is not installed.

    """
    if unit.path.suffix in PARQUET:
        yield from rows_of(unit)
        return
    for place, line in lines_of(unit):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{place_of(unit, place)} is no JSON ({error}); mend or remove that line"
            ) from None
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{place_of(unit, place)} is no JSON object; write one with a field for each part"
            )
        yield place, found


def place_of(unit: Unit, place: int) -> str:
    """``FILE: line 12``, or ``FILE: row 11`` of Parquet, whose rows are counted from 0.

    Lines are counted only now, as units begin in the middle of files.
    """
    if unit.path.suffix in PARQUET:
        return f"{unit.path}: row {place}"
    whole = replace(unit, start=0)
    number = sum(1 for start, _ in lines_of(whole) if start <= place)
    return f"{unit.path}: line {number}"


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
