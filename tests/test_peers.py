"""Ranks that go away, alone or together: the others end soon, and one sentence says why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.distributed
RANKS = Path(__file__).parent / "support" / "ranks_that_fail.py"
PORT = 29000 + os.getpid() % 1000
GONE = "rank 1 is gone (killed, out of memory, or its machine failed), so all ranks end"


def outcome(kind: str) -> tuple[int, list[str], float]:
    """Exit code, what the ranks said, and seconds."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    started = time.monotonic()
    done = subprocess.run(
        [*launch, str(RANKS), kind],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.startswith(("error:", "rank ", "Error", "Traceback"))
        and "torch.distributed.elastic" not in line
    ]
    return done.returncode, said, time.monotonic() - started


@contextmanager
def by_hand(kind: str, rank: int) -> Iterator[subprocess.Popen[str]]:
    """A rank of two that torchrun knows nothing of."""
    process = subprocess.Popen(
        [sys.executable, str(RANKS), kind],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(PORT),
        },
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str], start: str) -> str:
    """Of what it says on stderr; the test's time limit ends the waiting."""
    assert process.stderr
    return next(line for line in process.stderr if line.startswith(start))


@pytest.mark.parametrize(
    "kind",
    ["killed", *(pytest.param(k, marks=pytest.mark.slow) for k in ("leaves", "stands still"))],
)
def test_the_others_end_with_one_sentence(kind: str) -> None:
    code, said, seconds = outcome(kind)
    assert code != 0
    told = [line for line in said if line.startswith("error:")]
    assert len(told) == 1
    assert GONE in told[0]
    assert "run the same command again" in told[0]
    assert seconds < 120  # the minute, and the start; without a watch it is ten minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("too few", "error: tp 4 needs 4 processes, or a multiple of that, and there are 2"),
        ("all fail", "error: all ranks say this"),
        ("fails", "error: one rank says this"),
        ("breaks", "error: internal error (ValueError('connected to nothing'))"),
    ],
)
def test_an_error_is_told_once(kind: str, text: str) -> None:
    code, said, _ = outcome(kind)
    assert code != 0
    (told,) = (line for line in said if line.startswith("error:"))
    assert told.startswith(text)


@pytest.mark.slow
def test_a_rank_that_holds_the_store_and_stands_still_is_missed() -> None:
    with by_hand("rank 0 stands still", 0), by_hand("rank 0 stands still", 1) as other:
        assert first_line(other, "error:").startswith(GONE.replace("rank 1", "error: rank 0"))
        assert other.wait(10) == 1


@pytest.mark.slow
@pytest.mark.parametrize("here", [0, 1])
def test_a_rank_that_does_not_start_is_named(here: int) -> None:
    with by_hand("slow", here) as process:
        said = first_line(process, "waiting")
        assert said == f"waiting for rank {1 - here} of 2 to start\n"
        process.terminate()
        said = first_line(process, "error:")
        assert said.startswith(f"error: ended by SIGTERM before rank {1 - here} of 2 had started")
        assert process.wait(20) == 1


def test_only_processes_that_can_be_seen_are_missed() -> None:
    """A number that means no process here may mean one in another container."""
    from gptoss_plugins.gpt_model.peers import _has_ended, _machine

    here = _machine()
    assert here
    assert not _has_ended(f"{here} {os.getpid()} 7", here)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie then
    assert _has_ended(f"{here} {child.pid} 7", here)
    child.wait()
    assert _has_ended(f"{here} {child.pid} 7", here)
    assert not _has_ended(f"{here}0 {child.pid} 7", here)
    assert not _has_ended(f" {child.pid} 7", "")
    assert not _has_ended("", here)


@pytest.mark.slow
def test_ranks_that_are_slow_are_not_gone() -> None:
    code, said, _ = outcome("slow")
    assert code == 0
    assert sorted(said) == ["rank 0 is done", "rank 1 is done"]
