"""Several processes at one conversion: the same bytes as one, whoever dies, however often they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.convert import export_checkpoint, prepare_export, prepare_import
from gptoss_convert.crew import Crew, as_crew, claim, current_crew
from gptoss_convert.errors import ConvertError, IncompleteError, UsageError
from gptoss_convert.execute import Executor
from gptoss_convert.plan import Group
from gptoss_convert.staging import unfinished

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "gptoss-convert")
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def alone(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "megatron"
    prepare_import(originals["mxfp4"]).run(folder)
    return folder


def work(source: Path, target: Path, rank: int, size: int) -> Any:
    with as_crew(Crew(rank, size)):
        return prepare_import(source).run(target, workers=1)


# --- who does what --------------------------------------------------------------------------------


def groups(*sizes: int) -> list[Group]:
    class Sized(Group):
        nbytes = property(lambda self: self.size)  # type: ignore[assignment]

    made = []
    for number, size in enumerate(sizes):
        group = Sized(f"g{number}", ())
        object.__setattr__(group, "size", size)
        made.append(group)
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_shares_are_a_division(size: int) -> None:
    every = groups(5, 1, 9, 9, 2, 7, 3)
    shares = [Crew(rank, size).share(every) for rank in range(size)]
    assert sorted(g.name for share in shares for g in share) == [f"g{n}" for n in range(7)]
    loads = [sum(g.nbytes for g in share) for share in shares]
    assert max(loads) <= max(9, 36 / size + 5)  # none has more than its part and one group


def test_the_division_does_not_hang_on_the_order() -> None:
    every = groups(4, 4, 4, 4, 4)
    assert Crew(0, 2).owners(every) == Crew(1, 2).owners(every[::-1])


ENVIRONMENTS = [
    ({}, Crew()),
    ({"RANK": "2", "WORLD_SIZE": "5"}, Crew(2, 5)),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, Crew(1, 4)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Crew()),  # a batch script, not a step of srun
    (
        {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"},
        Crew(0, 2),
    ),
]


@pytest.mark.parametrize(("environment", "crew"), ENVIRONMENTS)
def test_environments(
    environment: dict[str, str], crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert current_crew() == crew


@pytest.mark.parametrize("values", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_senseless_environments(values: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", values[0])
    monkeypatch.setenv("WORLD_SIZE", values[1])
    with pytest.raises(UsageError, match="do not number a process"):
        current_crew()


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_as_many_as_there_are(
    originals: dict[str, Path], alone: Path, tmp_path: Path, tree: Tree, size: int
) -> None:
    target = tmp_path / "together"
    results = [work(originals["mxfp4"], target, rank, size) for rank in reversed(range(size))]
    assert [r.finished for r in results].count(True) == 1
    assert tree(target) == tree(alone)
    assert unfinished(target) == []


def test_the_report_of_all_is_whole(
    originals: dict[str, Path],
    alone: Path,
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gptoss_plugins.huggingface.sink.SHARD_BYTES", 50_000)
    one = export_checkpoint(alone, tmp_path / "one", export_dtype="mxfp4")
    for rank in range(3):
        with as_crew(Crew(rank, 3)):
            conversion = prepare_export(alone, export_dtype="mxfp4")
            result = conversion.run(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    assert result.finished
    assert result.losses == one.losses


# --- who dies, who comes late, who comes twice ---------------------------------------------------


class Killed(BaseException):
    pass


def test_a_dead_process_is_run_again(
    originals: dict[str, Path],
    alone: Path,
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "together"
    convert, calls = Executor._convert, iter(range(99))

    def die(self: Executor, *arguments: Any) -> None:
        if next(calls) == 7:
            raise Killed
        convert(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "_convert", die)
        with pytest.raises(Killed):
            work(originals["mxfp4"], target, 1, 2)
    assert not work(originals["mxfp4"], target, 0, 2).finished
    assert not target.exists()
    (folder,) = unfinished(target)
    kept = {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.distcp")}
    assert work(originals["mxfp4"], target, 1, 2).finished
    made = {p.name: p.stat().st_mtime_ns for p in target.rglob("*.distcp")}
    assert kept.items() <= made.items()  # nobody's work was done again
    assert tree(target) == tree(alone)


def test_one_process_can_finish_what_several_began(
    originals: dict[str, Path], alone: Path, tmp_path: Path, tree: Tree
) -> None:
    work(originals["mxfp4"], tmp_path / "out", 2, 4)
    prepare_import(originals["mxfp4"]).run(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(alone)


def test_a_late_process_finds_it_finished(
    originals: dict[str, Path], tmp_path: Path, tree: Tree
) -> None:
    target = tmp_path / "out"
    for rank in range(2):
        work(originals["mxfp4"], target, rank, 2)
    before = tree(target)
    assert not work(originals["mxfp4"], target, 0, 2).finished
    assert tree(target) == before
    with pytest.raises(ConvertError, match="is not empty"):  # another result is no late one
        work(originals["bf16"], target, 0, 2)


def test_a_damaged_result_is_not_finished(
    originals: dict[str, Path], alone: Path, tmp_path: Path, tree: Tree
) -> None:
    target = tmp_path / "out"
    for overwrite in (False, True):
        for rank in range(2):
            with as_crew(Crew(rank, 2)):
                prepare_import(originals["mxfp4"]).run(target, overwrite=overwrite)
        assert tree(target) == tree(alone)
        next(target.rglob("__1_0.distcp")).unlink()


def test_a_process_that_was_started_twice(originals: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    work(originals["mxfp4"], target, 1, 2)
    (folder,) = unfinished(target)
    for done in folder.rglob("*.distcp"):
        done.unlink()  # as if it were still at them
    held = [claim(path) for path in folder.glob(".claim-*")]
    try:
        with pytest.raises(ConvertError, match="another process is writing it"):
            work(originals["mxfp4"], target, 1, 2)
    finally:
        for fd in held:
            os.close(fd)  # type: ignore[arg-type]


def test_commit(
    originals: dict[str, Path],
    alone: Path,
    tmp_path: Path,
    tree: Tree,
    invoke: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, words = tmp_path / "out", ("import", "--hf-model", originals["mxfp4"])
    assert "no processes" in invoke("commit", target).stderr
    for rank, stop in ((0, False), (1, True)):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "2")
            if stop:  # before anything is put in place
                patch.setattr("gptoss_convert.conversion.Conversion._ready", lambda *_: False)
            for begun in [False] if stop else [False, True]:
                done = invoke(*words, "--megatron-path", target)
                assert done.returncode == 0
                assert ("going on with the unfinished" in done.stderr) is begun
        if not stop:
            done = invoke("commit", target)
            assert done.returncode == IncompleteError.exit_code
            assert "parts are missing" in done.stderr
    done = invoke("commit", target)
    assert done.returncode == 0, done.stderr
    assert tree(target) == tree(alone)
    done = invoke("commit", target)
    assert done.returncode == 1
    assert "it is there already" in done.stderr


@pytest.mark.slow
def test_torchrun_and_a_kill(
    originals: dict[str, Path], alone: Path, tmp_path: Path, tree: Tree
) -> None:
    """Three real processes of torchrun; then three by hand, one killed on the way and run again."""
    words = [PROGRAM, "import", "--hf-model", str(originals["mxfp4"]), "--megatron-path"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--no-python"]
    subprocess.run([*launch, *words, str(tmp_path / "torchrun")], check=True, timeout=200)
    assert tree(tmp_path / "torchrun") == tree(alone)

    def start(rank: int) -> subprocess.Popen[bytes]:
        here = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3"}
        return subprocess.Popen([*words, str(tmp_path / "killed")], env=here)

    doomed, *others = [start(rank) for rank in range(3)]
    while not unfinished(tmp_path / "killed") and doomed.poll() is None:
        time.sleep(0.01)
    doomed.send_signal(signal.SIGKILL)
    assert doomed.wait(60) in (-signal.SIGKILL, 0)
    assert [process.wait(60) for process in others] == [0, 0]
    assert start(0).wait(60) == 0
    assert tree(tmp_path / "killed") == tree(alone)
