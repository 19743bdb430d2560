"""Work cut into parts, in a folder beside the result: any process makes any part, none twice.

A part counts once its last file is there; so a run that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TYPE_CHECKING

from gptoss_convert.errors import IncompleteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from gptoss_plugins.data.units import Unit

NOTE = "plan.json"


def claim(parts: Path, plan: str, last: str) -> None:
    """Go on with what an earlier run left, if it is of the same inputs and options.

    Args:
        parts: the folder; made, with those it is in, if it is not there.
        plan: says all that decides the parts.
        last: suffix of the file that a part has once it is whole.

    Raises:
        IncompleteError: it is of others, and has parts that are whole.

    """
    note = parts / NOTE
    same = note.exists() and note.read_text() == plan
    if not same and any(parts.glob(f"*{last}")):
        raise IncompleteError(
            f"{parts}: is an unfinished run of other inputs or options; finish it with those, or remove it"
        )
    if not same:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        note.write_text(plan)


def part_file(parts: Path, number: int, suffix: str) -> Path:
    """A file of a part."""
    return parts / f"{number:06}{suffix}"


def make_parts(
    make: Callable[[Path, int, Unit, Any], None],
    parts: Path,
    units: Sequence[Unit],
    job: Any,
    last: str,
    *,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Make the parts that are not there.

    Args:
        make: makes one of the folder, its number, its unit, and the job; can be pickled.
        parts: the folder.
        units: what the parts are made of.
        job: how.
        last: suffix of the file that a part has once it is whole.
        workers: processes.
        progress: is told bytes of input as they are done.

    """
    sizes = [unit.nbytes for unit in units]
    todo = [n for n in range(len(units)) if not part_file(parts, n, last).exists()]
    progress(sum(sizes) - sum(sizes[number] for number in todo))
    if workers == 1 or len(todo) < 2:
        for number in todo:
            make(parts, number, units[number], job)
            progress(sizes[number])
        return
    # Fresh processes: tokenizers and torch have threads, which do not survive a fork.
    with ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn")) as pool:
        futures = {pool.submit(make, parts, n, units[n], job): n for n in todo}
        for future in futures:
            future.add_done_callback(lambda f: progress(sizes[futures[f]]))
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()
