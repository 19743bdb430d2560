"""The exception tree. Each class carries the exit code of the command line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST_SHOWN = 20
_LONGEST, _END = 2000, 300  # characters of a sentence, and how many of them are its end


def printable(text: str) -> str:
    """Escape what is not printable, and leave out the middle of what is endless: names from
    strangers must not draw on the terminal.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _END]} ... {text[-_END:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ConvertError(Exception):
    """A problem the user can do something about; its text is one clear sentence."""

    exit_code = 1

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class UsageError(ConvertError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class MismatchError(ConvertError):
    """Two checkpoints that should be equal are not."""

    exit_code = 3


class ResourceError(ConvertError):
    """Not enough disk or memory."""

    exit_code = 4


class IncompleteError(ConvertError):
    """The work stopped part of the way; running the same command again goes on from there."""

    exit_code = 5


class PluginError(ConvertError):
    """A plugin broke its contract, or several answer where one must."""


class EncodeError(ValueError):
    """A codec met a value that it cannot hold.

    Attributes:
        row: which row of dim 0 of the tensor it was given.

    """

    def __init__(self, row: int, text: str) -> None:
        self.row = row
        super().__init__(text)


def choose(error: BaseException) -> None:
    """Of the errors that several processes of a launch have, this one is to be told."""
    error.is_chosen = True  # type: ignore[attr-defined]


def is_chosen(error: BaseException) -> bool:
    """Whether the processes have agreed to tell this one."""
    return getattr(error, "is_chosen", False)


@contextlib.contextmanager
def blame(plugin_part: str) -> Iterator[None]:
    """Turn an unexpected error inside a plugin's function into one that names the plugin."""
    try:
        yield
    except ConvertError:
        raise
    except Exception as error:
        raise PluginError(
            f"{plugin_part} failed ({type(error).__name__}: {error}); report it to its plugin, "
            f"--debug shows where"
        ) from error


class CheckpointError(ConvertError):
    """A checkpoint cannot be read: missing, damaged, or not what it claims to be."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint to look at: a name that leads nowhere, or a folder without one."""


class ConfigError(CheckpointError):
    """A model's config lacks a field, or holds a value the conversion cannot carry."""


class PlanError(CheckpointError):
    """A checkpoint does not fit its model's mapping table.

    Attributes:
        problems: every misfit, sorted, each ``<tensor>: <what is wrong>; <what to do>``.

    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = tuple(sorted({printable(problem) for problem in problems}))
        Exception.__init__(self, self._text(printable(where)))

    def _text(self, where: str) -> str:
        if len(self.problems) == 1:
            return f"{where}: {self.problems[0]}"
        lines = [f"{where}: {len(self.problems)} problems", *self.problems[:MOST_SHOWN]]
        if (rest := len(self.problems) - MOST_SHOWN) > 0:
            lines.append(f"... and {rest} more")
        return "\n  ".join(lines)
