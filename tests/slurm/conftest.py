"""A real Slurm cluster on this machine, for the session."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODES = 3  # one to spare, for a job of two that loses one
ENDED = ("COMPLETED", "FAILED", "CANCELLED")
PATIENCE = 600  # seconds, on two cores that others use, too


class Cluster:
    """Slurm's daemons, and what the tests ask of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command: object, **environment: object) -> subprocess.CompletedProcess[str]:
        """A program beside the daemons."""
        return subprocess.run(
            list(map(str, command)),
            env={**self.environment, **{name: str(v) for name, v in environment.items()}},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def submit(self, script: str, *options: object, **environment: object) -> str:
        """A script of examples/, as it is; the job's number."""
        log = f"--output={self.folder}/%j.log"
        path = ROOT / "examples" / script
        found = self.run("sbatch", "--parsable", log, *options, path, **environment)
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    def launch(self, *words: object, **environment: object) -> dict[str, str]:
        """``launch slurm``: its result."""
        found = self.run("gptoss-convert", "launch", "slurm", "--json", *words, **environment)
        assert found.returncode == 0, found.stderr
        result: dict[str, str] = json.loads(found.stdout)
        return result

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        found = self.run("scontrol", "--oneliner", "show", "job", job)
        assert found.returncode == 0, found.stderr
        return dict(re.findall(r"(\w+)=(.*?)(?= \w+=|\s*$)", found.stdout))

    def end(self, job: str) -> dict[str, str]:
        """The same when it has ended."""
        end = time.monotonic() + PATIENCE
        while (facts := self.facts(job))["JobState"] not in ENDED:
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.5)
        return facts

    def completed(self, job: str) -> str:
        """The log of a job that ends well."""
        facts = self.end(job)
        log = self.log(job)
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
        return log

    def log(self, job: str) -> str:
        """All that a job said."""
        path = Path(self.facts(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else "nothing"

    def until(self, true: Callable[[], bool], job: str) -> None:
        """Wait for something that a job does."""
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, self.log(job)
            assert not job or self.facts(job)["JobState"] not in ENDED, self.log(job)
            time.sleep(0.5)

    def lose(self, node: str) -> None:
        """A node that breaks down: its slurmd, and all that it had started."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        marks = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if marks <= set(environ.read_bytes().decode(errors="replace").split("\0")):
                    os.kill(int(environ.parent.name), signal.SIGKILL)

    def repair(self, node: str) -> None:
        """Start its slurmd again."""
        assert self.run("slurmd", "-N", node).returncode == 0
        self.until(lambda: "idle" in self.run("sinfo", "-hn", node, "-o%t", "-pbatch").stdout, "")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of two CPUs; all of them are this machine."""
    if os.geteuid():
        pytest.skip("only root can start the daemons of a Slurm cluster")
    if not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        pytest.skip("Slurm is not installed; tests/slurm/cluster.sh install does it")
    folder = tmp_path_factory.mktemp("cluster")
    program = HERE / "cluster.sh"
    subprocess.run([program, "start", folder, str(NODES)], check=True, capture_output=True)
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([program, "stop", folder], check=True, capture_output=True)
