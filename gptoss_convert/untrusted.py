"""Files of a folder that a stranger made: how much of one is read, and how far its links lead."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MOST_COMPANION = 256 << 20  # bytes; the largest tokenizers there are take a tenth of that
# A folder of a model in huggingface_hub's cache: links to the bytes, which stand in ``blobs`` beside.
_SNAPSHOT = re.compile(r"(?P<repository>.*/models--[^/]+)/snapshots/[^/]+")


def read_small(path: Path, most: int, remedy: str = "fetch it again") -> bytes:
    """The bytes of a file that has to be small; never waits for one, as a pipe would make it.

    Args:
        path: the file.
        most: how long it may be.
        remedy: what to do if it is no such file, for the message.

    Raises:
        FileNotFoundError: it is missing.
        CheckpointError: it is not to be read, too long, or no plain file.

    """
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise CheckpointError(f"{path}: is no plain file; {remedy}")
            if facts.st_size > most:
                raise CheckpointError(
                    f"{path}: takes {facts.st_size:,} bytes where {most:,} would be many; {remedy}"
                )
            return file.read(most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from None


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object in which a name stands twice means two things, and is refused.

    Raises:
        ValueError: naming the name.

    """
    found = dict(pairs)
    if len(found) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} stands twice")
    return found


def require_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse files that are links out of the folder: what they hold is the user's, not the model's.

    In the hub's cache a model is made of such links, and they lead to its own files.

    Raises:
        CheckpointError: naming the first.

    """
    home = os.path.realpath(folder)
    cached = _SNAPSHOT.fullmatch(home)
    homes = [home, *([f"{cached['repository']}/blobs"] if cached else [])]
    for path in filter(os.path.exists, paths):
        place = os.path.realpath(path)
        if not any(place == at or place.startswith(at.rstrip("/") + "/") for at in homes):
            raise CheckpointError(
                f"{path}: is a link to {place}, outside of the checkpoint; put the file itself there"
            )


def require_small(paths: Iterable[Path], most: int = MOST_COMPANION) -> None:
    """Refuse files that are too long to be what they are called.

    Raises:
        CheckpointError: naming the first.

    """
    for path in paths:
        if (size := path.stat().st_size) > most:
            raise CheckpointError(
                f"{path}: takes {size:,} bytes where {most:,} would be many; remove it or fetch it "
                f"again"
            )
