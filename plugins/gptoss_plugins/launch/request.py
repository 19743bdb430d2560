"""What a user asks of the cluster, checked before any of it stands in a script."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_AHEAD = 300  # seconds; Slurm itself may be a minute early
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ARRAY = re.compile(r"[0-9][0-9,:-]*(%[0-9]+)?")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on, as sbatch has them
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# Options of sbatch on which the script relies.
_OWN = (
    *("array", "gpus-per-node", "job-name", "nodes", "no-requeue", "ntasks"),
    *("ntasks-per-node", "output", "requeue", "signal", "time"),
)
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """Options of ``launch slurm``.

    Attributes:
        job_dir: folder for script and log.
        name: of the job.
        time, partition, account: as sbatch takes them; None for the cluster's default.
        ahead: seconds before the time limit at which ranks are told to save.
        container_image, container_mounts: of pyxis; None for none.
        env: variables that the script sets.
        passed: variables that the submission's environment sets.
        requeue: whether the job starts again after preemption, a node's failure, or its time limit.
        array: numbers of the tasks of a job array; None for a plain job.
        cpus_per_task: of a launcher, or of a process without one; None for a node's.
        exclusive: whether nodes are the job's alone.
        further: more options of sbatch, as they are.

    """

    job_dir: Path
    name: str
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    ahead: int = _AHEAD
    container_image: str | None = None
    container_mounts: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    passed: tuple[str, ...] = ()
    requeue: bool = False
    array: str | None = None
    cpus_per_task: int | None = None
    exclusive: bool = True
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise UsageError(f"--array {self.array}: is no list of numbers such as 0-3 or 1,5%2")
        for word in self.further:
            name = word.removeprefix("--").partition("=")[0]
            if not _OPTION.fullmatch(name):
                raise UsageError(f"--sbatch {word!r}: is no NAME=VALUE of sbatch, such as qos=high")
            if name in _OWN:
                raise UsageError(
                    f"--sbatch {word}: launch slurm itself says sbatch's --{name}; its own options "
                    f"do so (launch slurm --help)"
                )
        if self.container_mounts and not self.container_image:
            raise UsageError("--container-mounts needs a container; name it by --container-image")


def ahead_of(ahead: int | None, time: str | None) -> int:
    """Seconds before the time limit at which ranks save: as said, or 300, but no more than a quarter.

    Raises:
        UsageError: it would leave less time to train than to save.

    """
    limit = seconds(time) if time is not None else None
    if limit is None:
        return ahead or _AHEAD
    if ahead is not None and limit < 2 * ahead:
        raise UsageError(
            f"--ahead {ahead}: is how many seconds before the end training saves, and --time {time} is "
            f"only {limit}; say --ahead {max(1, limit // 4)}, or a longer --time"
        )
    return ahead or max(1, min(_AHEAD, limit // 4))


def seconds(time: str) -> int:
    """A time limit in seconds.

    Raises:
        UsageError: sbatch does not know the form.

    """
    match = _TIME.fullmatch(time)
    if not match:
        raise UsageError(
            f"--time {time}: is no time limit; write it as minutes, hours:minutes:seconds, or "
            f"days-hours:minutes:seconds"
        )
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        units = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]  # type: ignore[assignment]
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def variables(
    words: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """``NAME=VALUE`` and ``NAME`` -> those to set, and those to hand on.

    Raises:
        UsageError: a name is none, or a variable to hand on is not set, or a secret would be written
            down.

    """
    chosen, passed = [], []
    for word in words:
        name, equals, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise UsageError(f"--env {word}: is neither NAME=VALUE nor NAME")
        if equals and _SECRET.search(name):
            raise UsageError(
                f"--env {name}=...: would stand where others can read it; export {name}, and "
                f"say --env {name}"
            )
        if equals:
            chosen.append((name, value))
        elif name in environment:
            passed.append(name)
        else:
            raise UsageError(f"--env {name}: is not set here; say --env {name}=VALUE, or export it")
    return tuple(chosen), tuple(passed)
