"""Files of documents, cut into units that can be read by themselves, on any process, again and again.

A plain JSONL file is cut at lines near every ``UNIT_BYTES``; a compressed one is a unit, since it can
only be read from its start; a Parquet file has a unit for each row group.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError, ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

UNIT_BYTES = 64 << 20
LONGEST_LINE = 1 << 30  # bytes of a document; a file without line ends is no JSONL
PLAIN, ZSTD, PARQUET = (".jsonl", ".json"), (".zst", ".zstd"), (".parquet",)


@dataclass(frozen=True)
class Unit:
    """A part of a file.

    Attributes:
        path: the file.
        start, stop: bytes ``[start, stop)`` of a plain one; row groups of a Parquet one; of a
            compressed one ``[0, size)``.
        nbytes: of the file, about as many as it takes; all units together its size.

    """

    path: Path
    start: int
    stop: int
    nbytes: int


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files named, and in folders named all that can be read, by name.

    Raises:
        UsageError: nothing is there, or it is of no kind that is known.

    """
    known = (*PLAIN, *ZSTD, *PARQUET)
    found: list[Path] = []
    for place in inputs:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix in known)
            if not inside:
                raise UsageError(f"{place}: has no file that ends in {', '.join(known)}")
            found += inside
        elif not place.is_file():
            raise UsageError(f"{place}: is not there; name a file or a folder of documents")
        elif place.suffix not in known:
            raise UsageError(f"{place}: ends in none of {', '.join(known)}; rename or convert it")
        else:
            found.append(place)
    return found


def units_of(path: Path) -> list[Unit]:
    """A file's units, in order."""
    size = path.stat().st_size
    if path.suffix in PARQUET:
        count = parquet_file(path).num_row_groups
        edges = [size * group // count for group in range(count + 1)] if count else []
        return [
            Unit(path, group, group + 1, end - start)
            for group, (start, end) in enumerate(pairwise(edges))
        ]
    if path.suffix in ZSTD:
        return [Unit(path, 0, size, size)]
    edges = [0]
    with open(path, "rb") as file:
        while edges[-1] + UNIT_BYTES < size:
            file.seek(edges[-1] + UNIT_BYTES)
            _line(file, path)  # to its end: a line belongs to the unit that it begins in
            if file.tell() >= size:
                break
            edges.append(file.tell())
    pairs = pairwise([*edges, size])
    return [Unit(path, start, stop, stop - start) for start, stop in pairs if start < stop]


def lines_of(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Each line and where it begins, in bytes of the file as it was before it was compressed."""
    with open(unit.path, "rb") as raw:
        file: Any = raw
        if unit.path.suffix in ZSTD:
            file = _decompressed(raw, unit.path)
        else:
            raw.seek(unit.start)
        place = unit.start
        while unit.path.suffix in ZSTD or place < unit.stop:
            line = _line(file, unit.path)
            if not line:
                return
            yield place, line
            place += len(line)


def _line(file: Any, path: Path) -> bytes:
    try:
        line: bytes = file.readline(LONGEST_LINE)
    except OSError as error:
        if "Truncated" in str(error):
            raise CheckpointError(f"{path}: is cut off; fetch it again") from None
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from None
    if len(line) == LONGEST_LINE:
        raise CheckpointError(f"{path}: has a line of more than {LONGEST_LINE} bytes; is it JSONL?")
    return line


def _decompressed(raw: Any, path: Path) -> Any:
    """All frames, by pyarrow, which unlike zstandard's reader tells the end from a cut."""
    _require_pyarrow(path)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)


def parquet_file(path: Path) -> Any:
    """A file opened by pyarrow.

    Raises:
        ConfigError: pyarrow is not installed.
        CheckpointError: it is no Parquet file.

    """
    _require_pyarrow(path)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except Exception as error:
        raise CheckpointError(f"{path}: is no Parquet file ({error}); fetch it again") from None


def _require_pyarrow(path: Path) -> None:
    if not find_spec("pyarrow"):
        raise ConfigError(
            f"{path}: needs pyarrow, which is not installed: pip install 'gptoss-convert[data]'"
        )


def rows_of(unit: Unit, *columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file's unit, and each one's number in the file.

    Args:
        unit: of the file.
        columns: what to read; everything, if none is named.

    Raises:
        CheckpointError: the file is damaged, or lacks a column.

    """
    file = parquet_file(unit.path)
    names = file.schema_arrow.names
    if missing := [name for name in columns if name not in names]:
        raise CheckpointError(
            f"{unit.path}: has no column {missing[0]!r}, only {', '.join(names)}; name one with "
            f"--json-key"
        )
    number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    batches = file.iter_batches(
        1024, row_groups=[*range(unit.start, unit.stop)], columns=columns or None
    )
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except Exception as error:  # pyarrow's own, or text that is no UTF-8
            raise CheckpointError(
                f"{unit.path}: cannot be read from row {number} on ({error}); fetch it again"
            ) from None
        for row in rows:
            yield number, row
            number += 1
