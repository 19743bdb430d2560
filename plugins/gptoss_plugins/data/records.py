"""Records and documents of files, each with the place to name when it is bad."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.data.sft.records import BadRecordError, require_utf8
from gptoss_plugins.data.units import PARQUET, lines_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.data.units import Unit


def records_in(unit: Unit, *columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of a unit, and where it stands, for :func:`place_of`; empty lines are none.

    Args:
        unit: of a file.
        columns: of Parquet, to read no others; all, if none is named.

    Raises:
        CheckpointError: a line is no JSON object; a column is not there.
        ConfigError: the package that reads such files is not installed.

    """
    if unit.path.suffix in PARQUET:
        yield from rows_of(unit, *columns)
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


def documents(unit: Unit, key: str) -> Iterator[str]:
    """The texts of a unit, in order; empty ones too.

    Args:
        unit: of a file.
        key: the field, or column, that has the text.

    Raises:
        CheckpointError: a record has no text under ``key``, or one that is no UTF-8.
        ConfigError: the package that reads such files is not installed.

    """
    for place, record in records_in(unit, key):
        text = record.get(key)
        if not isinstance(text, str):
            raise CheckpointError(
                f"{place_of(unit, place)} has no text under {key!r}; name the field with --json-key"
            )
        try:
            require_utf8(key, text)
        except BadRecordError as error:
            raise CheckpointError(f"{place_of(unit, place)} {error}") from None
        yield text


def place_of(unit: Unit, place: int) -> str:
    """``FILE: line 12``, or ``FILE: row 11`` of Parquet, whose rows are counted from 0.

    Lines are counted only now, as units begin in the middle of files.
    """
    if unit.path.suffix in PARQUET:
        return f"{unit.path}: row {place}"
    whole = replace(unit, start=0)
    number = sum(1 for start, _ in lines_of(whole) if start <= place)
    return f"{unit.path}: line {number}"
