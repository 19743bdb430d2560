"""Checksums of files that are on disk already."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from gptoss_convert.blockio import BlockReader
from gptoss_convert.checksums import Summing
from gptoss_convert.errors import CheckpointError
from gptoss_convert.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from gptoss_convert.checksums import FileSum, Span

_BLOCK = 8 << 20


def files_in(folder: Path) -> set[str]:
    """Names of all files below a folder, hidden ones and links included."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(folder).as_posix() for p in found}


def sum_of(
    path: Path, tensors: Iterable[Span] = (), progress: Callable[[int], None] = lambda nbytes: None
) -> FileSum:
    """The checksums of a file, by reading it past the page cache."""
    reader, sums = BlockReader(path), Summing(tensors)
    buffer = memoryview(mmap.mmap(-1, _BLOCK))
    size = path.stat().st_size
    for start in range(0, size, _BLOCK):
        block = buffer[: min(_BLOCK, size - start)]
        reader.fill(buffer, start, len(block))
        sums.update(block)
        progress(len(block))
    return sums.total()


def sums_in(
    folder: Path, known: Mapping[str, FileSum], leave_out: tuple[str, ...] = ()
) -> dict[str, FileSum]:
    """The checksums of all files of an unfinished folder; those whose writing nobody saw are read.

    Args:
        folder: the folder.
        known: what was seen, by name in the folder.
        leave_out: what the names of notes begin with; they do not count.

    Raises:
        CheckpointError: a file is not what it was when it was written.

    """
    found = {}
    for name in files_in(folder) - {MANIFEST}:
        if name.startswith(leave_out) or name.endswith(".part"):
            continue
        found[name] = known.get(name) or sum_of(folder / name)
        if (folder / name).stat().st_size != found[name].nbytes:
            raise CheckpointError(
                f"{folder / name}: changed after it was written; leave the folder alone and run again"
            )
    return found
