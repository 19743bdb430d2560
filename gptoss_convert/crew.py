"""Several processes at one conversion, on one node or many, that share nothing but the folder.

Each process knows its number and how many there are, and takes its share of the groups; no message
passes between them. Whoever finds everything done puts the result in place. Which process writes a
group has no influence on its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.errors import ConvertError, UsageError
from gptoss_convert.staging import unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.plan import Group

# torchrun's, and those of a step of srun (a batch script by itself is one process, whatever its job has)
_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
COMMAND = ".command-"  # prefix of the notes, in the unfinished folder, of what the processes run
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Crew:
    """The processes of a conversion, as one of them sees it.

    Attributes:
        rank: this process.
        size: how many there are.
        commits_only: this one takes no share, and puts in place what others have made.

    """

    rank: int = 0
    size: int = 1
    commits_only: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether this process does everything."""
        return self.size == 1 and not self.commits_only

    def share(self, groups: Sequence[Group]) -> list[Group]:
        """This process's groups, in order; every process finds the same division."""
        if self.commits_only:
            return []
        return [group for group in groups if self.owners(groups)[group.name] == self.rank]

    def owners(self, groups: Sequence[Group]) -> dict[str, int]:
        """Who has which group: the largest first, each to the one with the least work so far."""
        load = [0] * self.size
        owner = {}
        for group in sorted(groups, key=lambda g: (-g.nbytes, g.name)):
            rank = load.index(min(load))
            load[rank] += group.nbytes
            owner[group.name] = rank
        return owner


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


def current_crew() -> Crew:
    """What :func:`as_crew` says, or else the environment of torchrun or srun.

    Raises:
        UsageError: the variables make no sense.

    """
    return _crew.get() or _from_environment(os.environ)


@contextlib.contextmanager
def as_crew(crew: Crew) -> Iterator[None]:
    """Within it, conversions are done as a member of this crew."""
    token = _crew.set(crew)
    try:
        yield
    finally:
        _crew.reset(token)


def _from_environment(environment: Mapping[str, str]) -> Crew:
    for rank, size in _VARIABLES:
        if rank in environment and size in environment:
            numbers = environment[rank], environment[size]
            if not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
                raise UsageError(
                    f"{rank}={numbers[0]} and {size}={numbers[1]} do not number a process; unset "
                    f"them, or start the processes by torchrun or srun"
                )
            return Crew(int(numbers[0]), int(numbers[1]))
    return Crew()


@contextlib.contextmanager
def stored_command(target: Path) -> Iterator[list[str]]:
    """The arguments of the command that several processes run for a target, in its folder.

    Raises:
        ConvertError: none do.

    """
    notes = sorted(note for f in unfinished(target) for note in f.glob(f"{COMMAND}*.json"))
    if not notes:
        raise ConvertError(
            f"{target}: no processes have left unfinished work for it; check the path"
            + (", it is there already" if target.is_dir() else "")
        )
    try:
        stored = json.loads(notes[0].read_bytes())
        arguments, folder = list(map(str, stored["arguments"])), str(stored["folder"])
    except (ValueError, KeyError, TypeError):
        raise ConvertError(f"{notes[0]}: is no command; run the processes again") from None
    with contextlib.chdir(folder):
        yield arguments


def claim(path: Path) -> int | None:
    """Hold a file for this process; the system lets go of it however the process ends.

    Returns:
        what to close to let go, or None if another process holds it.

    Raises:
        ConvertError: the file system knows no locks.

    """
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as error:
        os.close(fd)
        if error.errno in _NO_LOCKS:
            raise ConvertError(
                f"{path.parent}: its file system has no file locks, by which several processes "
                f"keep apart; use one process (--workers N), or another target"
            ) from None
        raise
    return fd
