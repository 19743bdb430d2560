"""Faults of disks in every direction: reads that fail, a disk that fills up, a source that changes.

Each fault is put at many places of a run, one after the other. test_crash.py kills runs, lets two
meet, and looks at what a stopped one leaves; real full disks are in test_bad_input.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.convert import import_checkpoint
from gptoss_convert.layout import Layout
from gptoss_convert.opening import Choice

Tree = Callable[[Path], dict[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
READS = ("pread", "preadv")
WRITES = ("mkdir", "posix_fallocate", "pwrite", "ftruncate", "fsync")
DIRECTIONS = {  # command, flag of the source, flag of the target, more
    "import": ("import", "--hf-model", "--megatron-path"),
    "import per rank": ("import", "--hf-model", "--megatron-path", "--format", "torch", "--tp", 2),
    "quantize": ("quantize", "--hf-model", "--hf-path"),
    "export": ("export", "--megatron-path", "--hf-path"),
    "export of ranks": ("export", "--megatron-path", "--hf-path"),
    "reshard": ("reshard", "--megatron-path", "--output"),
}


class Fault:
    """Functions of ``os`` that fail from a given call on; before that, they count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.calls, self._at, self._number = 0, 0, 0

    def watch(self, names: tuple[str, ...]) -> None:
        """Let these count."""
        for name in names:
            self._patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if 0 < self._at <= self.calls:
                raise OSError(self._number, os.strerror(self._number))
            return real(*arguments, **options)

        return call

    def begin(self, at: int = 0, number: int = 0) -> None:
        """Fail from call ``at`` on with this errno; never, if it is 0."""
        self.calls, self._at, self._number = 0, at, number


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    with monkeypatch.context() as patch:
        yield Fault(patch)


@pytest.fixture(scope="module")
def ranks(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "files"
    choice = Choice(format="torch")
    import_checkpoint(originals["bf16"], folder, layout=Layout(tp=2), choice=choice)
    return folder


@pytest.fixture(params=DIRECTIONS)
def words(
    request: pytest.FixtureRequest, originals: dict[str, Path], imported: Path, ranks: Path,
    tmp_path: Path,
) -> list[Any]:  # fmt: skip
    """A command line: its source is a copy, its target is ``place/out``."""
    command, source, target, *more = DIRECTIONS[request.param]
    megatron = ranks if request.param == "export of ranks" else imported
    origin = originals["bf16"] if source == "--hf-model" else megatron
    copy = shutil.copytree(origin, tmp_path / "source")
    (tmp_path / "place").mkdir()
    return [command, source, copy, target, tmp_path / "place" / "out", *more, "--workers", 1]


def places(calls: int) -> list[int]:
    """Some of so many calls: the first, the last, and a few between."""
    return sorted({1, 2, calls // 3, calls * 2 // 3, calls - 1} - {0})


def assert_one_sentence(done: subprocess.CompletedProcess[str], *says: str) -> None:
    lines = done.stderr.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, done.stderr
    assert all(line.startswith("  ") for line in lines[starts[0] + 1 :])  # a list of problems
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    for text in (*says, "; "):
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(("names", "number", "codes", "says"), [
    pytest.param(READS, errno.EIO, (1, 5), "Input/output error", id="reads fail"),
    pytest.param(WRITES, errno.ENOSPC, (4,), "the disk is full; make room", id="disk fills up"),
])  # fmt: skip
def test_faults_at_many_places(
    names: tuple[str, ...], number: int, codes: tuple[int, ...], says: str, words: list[Any],
    fault: Fault, invoke: Run, tree: Tree, tmp_path: Path,
) -> None:  # fmt: skip
    """A sentence, no target; and the same command makes it whole when the fault is over."""
    fault.watch(names)
    fault.begin()
    assert invoke(*words).returncode == 0
    whole, calls = tree(tmp_path / "place"), fault.calls
    assert calls >= 4
    for at in places(calls):
        shutil.rmtree(tmp_path / "place")
        (tmp_path / "place").mkdir()
        fault.begin(at, number)
        done = invoke(*words)
        fault.begin()
        if done.returncode == 0 or (tmp_path / "place" / "out").exists():
            assert tree(tmp_path / "place") == whole  # it failed when all was in place
            continue
        assert done.returncode in codes, (at, done.stderr)
        assert_one_sentence(done, says)
        again = invoke(*words)
        assert again.returncode == 0, (at, again.stderr)
        assert tree(tmp_path / "place") == whole


def test_a_source_that_changes_is_noticed(
    words: list[Any], invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another value in a tensor, while all is being converted: nothing is put in place."""
    data = max((p for p in words[2].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    real, done = os.posix_fallocate, []

    def meddle(*arguments: Any) -> None:
        real(*arguments)
        if not done:
            with open(data, "r+b") as file:
                file.seek(data.stat().st_size // 2)
                file.write(b"\1")
            done.append(data)

    monkeypatch.setattr(os, "posix_fallocate", meddle)
    ended = invoke(*words)
    assert done
    if ended.returncode == 3:  # two ranks' copies of one tensor, compared before the end
        assert_one_sentence(ended, str(data), "which must hold the same")
    else:
        assert ended.returncode == 1
        assert_one_sentence(ended, str(words[2]), "changed while it was being converted")
    assert list((tmp_path / "place").iterdir()) == []
