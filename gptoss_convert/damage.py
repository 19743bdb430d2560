"""Checking a folder against its manifest: every byte is read once, at the speed of the disk."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError, printable
from gptoss_convert.filesums import files_in, sum_of
from gptoss_convert.manifest import MANIFEST, read_manifest
from gptoss_convert.types import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from gptoss_convert.checksums import FileSum

_WORKERS = 4
_AGAIN = "copy it again from where it is whole, or convert again"


def check_manifest(
    folder: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[Finding]:
    """What is not as it was when the folder was written: nothing, if it is whole.

    Every finding is an ``error``; its ``where`` is a file's name in the folder. A file can be
    missing, extra, of another size, or damaged; damage is told per tensor that it is in, and if it
    is in none, as outside of them. Findings come as the files are done, in the order of their names,
    those on extra files last. Torch is not needed.

    Args:
        folder: the root of what was written, where ``manifest.json`` is.
        workers: files read side by side, each through a buffer of 8 MiB; None picks.
        progress: called with the bytes just checked, from any thread.

    Raises:
        CheckpointError: the manifest itself is missing, damaged, or says what cannot be. Nothing
            has been read then but the manifest.

    """
    files = read_manifest(folder).files
    return _findings(folder, files, workers or _WORKERS, progress)


def _findings(
    folder: Path, files: Mapping[str, FileSum], workers: int, progress: Callable[[int], None]
) -> Iterator[Finding]:
    stop = threading.Event()

    def check(name: str) -> list[Finding]:
        return list(_in_file(folder, name, files[name], _telling(progress, stop)))

    pool = ThreadPoolExecutor(workers, "verify")
    try:
        for found in pool.map(check, sorted(files)):
            yield from found
    finally:  # whoever asked may want no more
        stop.set()
        pool.shutdown(cancel_futures=True)
    for name in sorted(files_in(folder) - files.keys() - {MANIFEST}):
        yield _error(name, "was not written with the rest", "remove it if it does not belong here")


def _in_file(
    folder: Path, name: str, written: FileSum, progress: Callable[[int], None]
) -> Iterator[Finding]:
    path = folder / name
    try:
        if not path.is_file():
            yield _error(name, "is missing", _AGAIN)
            return
        if (size := path.stat().st_size) != written.nbytes:
            how = "cut short" if size < written.nbytes else "too long"
            yield _error(name, f"is {how}: {size} bytes, and {written.nbytes} were written", _AGAIN)
            return
        found = sum_of(path, written.tensors, progress)
    except CheckpointError as error:
        yield _error(name, f"changes while it is read ({error})", _AGAIN)
    except OSError as error:
        yield _error(
            name, f"cannot be read: {error.strerror}", "check its permissions and the disk"
        )
    else:
        yield from _differences(name, written, found)


def _differences(name: str, written: FileSum, found: FileSum) -> Iterator[Finding]:
    damaged = [span for span, digest in written.tensors.items() if found.tensors[span] != digest]
    for span in damaged:
        where = f"bytes {span.offset} to {span.end}"
        yield _error(name, f"tensor {span.name} is damaged, somewhere in {where}", _AGAIN)
    if not damaged and found.digest != written.digest:
        outside = " outside of its tensors, in its header or framing" if written.tensors else ""
        yield _error(name, f"is damaged{outside}", _AGAIN)


def _telling(progress: Callable[[int], None], stop: threading.Event) -> Callable[[int], None]:
    """Passes on what was checked, and ends the check once nobody wants to know."""

    def tell(nbytes: int) -> None:
        if stop.is_set():
            raise CheckpointError("nobody waits for the result")
        progress(nbytes)

    return tell


def _error(name: str, what: str, remedy: str) -> Finding:
    return Finding("error", printable(name), printable(what), remedy)
