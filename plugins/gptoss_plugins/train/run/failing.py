"""What torch and megatron-core raise over checkpoints, in a sentence.

torch's ``CheckpointException`` is no ``Exception``, and has what went wrong on each rank inside.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError, ConvertError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OURS = (ConvertError, KeyboardInterrupt, SystemExit, MemoryError)


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Inside, a checkpoint is written.

    Raises:
        OSError: as the disk said, if it did.
        ResourceError: in other words.

    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise cause from error
        raise ResourceError(
            f"{folder}: could not be written ({_line(cause)}); make room: the checkpoints before it "
            f"are whole"
        ) from error


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Inside, a checkpoint is read.

    Raises:
        CheckpointError: it is damaged, or another run's.

    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        raise CheckpointError(
            f"{folder}: no run with this config can go on from it ({_line(_cause(error))}); it is "
            f"damaged, or of another kind of run: use another one, or only its weights, by "
            f"checkpoint.pretrained_checkpoint"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The innermost failure of any rank."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return _cause(first[0] if isinstance(first, tuple) else first)
    return error.__cause__ if isinstance(error.__cause__, OSError) else error


def _line(error: BaseException) -> str:
    words = str(error).strip().splitlines() or [type(error).__name__]
    return words[0][:200]
