"""A script to Slurm: kept beside the results, handed in, and followed to its end."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_convert.blockio import write_note
from gptoss_convert.errors import ConvertError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a job that will not run again; all others are on their way.
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_ENDED_UNLESS_REQUEUED = ("NODE_FAIL", "PREEMPTED")
_PAUSE = 1.0  # seconds between two looks at the log
_LOOKS = 5  # at the log, for each at the job: the controller serves everybody
_PATIENCE = 24  # looks at the job, two minutes
_AT_ONCE = 1 << 20  # bytes of the log


@dataclass(frozen=True)
class Job:
    """A job that Slurm has taken.

    Attributes:
        number: Slurm's.
        script: that was submitted.
        log: file that it will write; of an array, with %a for the task.

    """

    number: str
    script: Path
    log: Path


def require_slurm() -> None:
    """Refuse a machine from which nothing can be submitted."""
    missing = [name for name in ("sbatch", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ConvertError(
            f"Slurm's {' and '.join(missing)} cannot be found here; run this on a login node of the "
            f"cluster, see the script by --dry-run, or use launch local"
        )


def submit(text: str, folder: Path, *, array: bool) -> Job:
    """Hand a script in; it stays in the folder, under the job's number.

    Raises:
        ConvertError: Slurm does not take it.

    """
    require_slurm()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".coming-"
    ) as own:  # others launch here, too
        coming = Path(own) / "job.sbatch"
        write_note(coming, text.encode(errors="surrogateescape"))
        number = _told(["sbatch", "--parsable", str(coming)]).partition(";")[0].strip()
        script = coming.rename(folder / f"{number}.sbatch")
    return Job(number, script, folder / (f"{number}_%a.log" if array else f"{number}.log"))


def follow(job: Job) -> int:
    """Show the log as it grows, on stdout, until the job has ended; on stderr what it waits for.

    Returns:
        its exit code.

    """
    shown, failed, looks, told = 0, 0, 0, ""
    while True:
        state, code = "", None
        if looks % _LOOKS == 0:
            try:
                state, code = ended(job.number)
                failed = 0
            except ConvertError:  # a busy controller does not always answer
                failed += 1
                if failed == _PATIENCE:
                    raise
        shown = _show(job.log, shown)
        if state and state != told:
            click.echo(f"job {job.number}: {state}", err=True)
            told = state
        if code is not None:
            return code
        time.sleep(_PAUSE)
        looks += 1


def ended(number: str) -> tuple[str, int | None]:
    """A job's state in words, and its exit code if it has ended for good.

    That of a job that Slurm ended is 1, whatever its script had to say.
    """
    facts = dict(
        re.findall(r"(\w+)=(\S+)", _told(["scontrol", "--oneliner", "show", "job", number]))
    )
    state, (code, number_of_signal) = facts["JobState"], facts["ExitCode"].split(":")
    words = state.lower()
    if state == "PENDING":
        words = f"{words} ({facts.get('Reason', 'None')})"
    if state == "COMPLETED" or (state == "FAILED" and int(code)):
        return words, int(code)
    if state == "FAILED":
        return words, 128 + int(number_of_signal)
    if state in _ENDED or (state in _ENDED_UNLESS_REQUEUED and facts.get("Requeue") != "1"):
        return words, 1
    return words, None


def _show(log: Path, start: int) -> int:
    """Print what is new; returns how far it is."""
    try:
        with open(log, "rb") as file:
            file.seek(start)
            while data := file.read(_AT_ONCE):
                click.echo(data, nl=False)
                start += len(data)
    except FileNotFoundError:
        pass  # the job has not begun
    return start


def _told(command: Sequence[str]) -> str:
    """What one of Slurm's programs prints.

    Raises:
        ConvertError: it fails, with its own words.

    """
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        words = " ".join(found.stderr.split()) or f"exit code {found.returncode}"
        raise ConvertError(f"{command[0]} does not do it ({words}); mend that and launch again")
    return found.stdout
