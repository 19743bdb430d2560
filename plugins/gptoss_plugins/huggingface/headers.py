"""Safetensors headers and the shard index, read with suspicion.

A file is 8 bytes of little-endian header length N, N bytes of JSON, then the data:
``{name: {"dtype", "shape", "data_offsets": [start, stop]}}``, offsets counted from the data's start
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import itemsize, known
from gptoss_convert.errors import CheckpointError, PlanError
from gptoss_convert.types import TensorSpec
from gptoss_convert.untrusted import no_duplicates, read_small, require_inside

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_LONGEST_JSON = 64 << 20  # an index takes 100 bytes per tensor
_MOST_SHARDS = 10_000
_DEEPEST = 32  # dims of a tensor; torch has no more than 64


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``start`` is its first byte, counted from the file's beginning."""

    file: str
    start: int
    spec: TensorSpec


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors, and how long it must be."""

    file: str
    nbytes: int
    header: bytes
    entries: Mapping[str, Entry]


def read_json(path: Path) -> Any:
    """Parse a JSON file; CheckpointError if it is missing or no JSON object."""
    try:
        text = read_small(path, _LONGEST_JSON).decode()
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; fetch the whole checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; fetch it again")
    return value


def read_shards(folder: Path) -> list[Shard]:
    """Headers of all shards of a checkpoint, checked against the index.

    Raises:
        CheckpointError: a file is missing or damaged.
        PlanError: index and shards disagree; every disagreement is listed.

    """
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    require_inside(folder, (folder / file for file in files))
    if weight_map is None:
        return [read_header(folder / SINGLE)]
    if absent := [f for f in files if not (folder / f).is_file()]:
        raise PlanError(
            str(folder),
            [f"{f}: is named in {INDEX} but is not there; fetch it" for f in absent],
        )
    shards = [read_header(folder / file) for file in files]
    if problems := list(_disagreements(weight_map, shards)):
        raise PlanError(str(folder), problems)
    return shards


def shard_files(folder: Path) -> list[str]:
    """The files that the index names, which are not looked at; the one there is without an index."""
    weight_map = _index(folder) if (folder / INDEX).exists() else None
    return sorted(set(weight_map.values())) if weight_map else [SINGLE]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file as the index has it; None for an unsharded checkpoint."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.is_file():
            raise CheckpointError(
                f"{folder}: has neither {INDEX} nor {SINGLE}; fetch the whole checkpoint"
            )
        return None
    if single.exists():
        raise CheckpointError(f"{folder}: has both {INDEX} and {SINGLE}; remove the stale one")
    return _index(folder)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file as the index has it."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise CheckpointError(
                f"{index}: places {name} in {file!r}, which is no file name; fetch it again"
            )
    if (count := len(set(weight_map.values()))) > _MOST_SHARDS:
        raise CheckpointError(
            f"{index}: names {count:,} files, as no checkpoint has; fetch it again"
        )
    return weight_map


def _disagreements(weight_map: Mapping[str, str], shards: Iterable[Shard]) -> Iterable[str]:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.entries:
            if name in seen:
                yield f"{name}: is in {seen[name]} and in {shard.file}; fetch both again"
            elif name not in weight_map:
                yield f"{name}: is in {shard.file} but not in {INDEX}; remove it or index it"
            elif weight_map[name] != shard.file:
                yield (
                    f"{name}: is in {shard.file}, and {INDEX} places it in {weight_map[name]}; "
                    f"fetch both again"
                )
            seen[name] = shard.file
    for name in weight_map.keys() - seen.keys():
        yield f"{name}: is not in {weight_map[name]}, where {INDEX} places it; fetch both again"


def read_header(path: Path, remedy: str = "fetch it again") -> Shard:
    """Read and check one file's header; the data need not be there yet.

    Args:
        path: the file.
        remedy: what to do if it is damaged, for the message.

    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path}: is cut short or no safetensors file ({size} bytes); {remedy}"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from None
    try:
        table = json.loads(header.decode(), object_pairs_hook=no_duplicates)
        if not isinstance(table, dict):
            raise ValueError("it is no object")
        table.pop("__metadata__", None)
        entries = {n: _entry(path.name, 8 + length, n, facts) for n, facts in table.items()}
        end = _require_gapless(entries, 8 + length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); {remedy}") from None
    return Shard(path.name, end, header, entries)


def _entry(file: str, data: int, name: str, facts: Mapping[str, Any]) -> Entry:
    dtype, shape, (start, stop) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if len(shape) > _DEEPEST:
        raise ValueError(f"{name} has {len(shape)} dims")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape} at {start}:{stop}")
    if not isinstance(dtype, str) or not known(dtype):
        raise ValueError(f"{name} has the unknown type {dtype}")
    if math.prod(shape) * itemsize(dtype) != stop - start:
        raise ValueError(f"{name}, {dtype} {shape}, cannot take {stop - start} bytes")
    return Entry(file, data + start, TensorSpec(tuple(shape), dtype))


def _require_gapless(entries: Mapping[str, Entry], data: int) -> int:
    """The format allows no holes and no overlaps; returns where the last tensor ends."""
    end = data
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].spec.nbytes)):
        if entry.start != end:
            raise ValueError(f"{name} begins at byte {entry.start}, not at {end}")
        end += entry.spec.nbytes
    return end
