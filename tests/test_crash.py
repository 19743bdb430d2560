"""Runs that are killed, interrupted, starved or doubled: never a wrong folder, never lost work.

Runs happen in children of a small server (this file, run as a script) that has torch loaded and
forks: a run then takes a tenth of a second instead of two, and a child can be made to die at any
step that the file system sees.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ != "__main__":
    import pytest

# Every step by which a run changes the disk, or makes a change last.
STEPS = (
    "mkdir", "posix_fallocate", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir",
)  # fmt: skip
# What a run would otherwise import in every child.
LOADED = (
    "yaml",
    "torch.distributed.checkpoint",
    "torch.utils.serialization",
    "gptoss_convert.progress",
    "gptoss_convert.report",
    "gptoss_kernels.mxfp4",
    *(
        f"gptoss_plugins.{kind}.{part}"
        for kind in ("huggingface", "megatron")
        for part in ("sink", "source")
    ),
)
Tree = Callable[[Path], dict[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


# ---- the server and its children


def serve() -> None:
    """Answer jobs, a JSON line each, until standard input ends."""
    from gptoss_convert.registry import Registry

    for name in LOADED:
        importlib.import_module(name)
    Registry().commands()
    for line in sys.stdin:
        job = json.loads(line)
        if "resume" in job:
            os.kill(job["resume"], signal.SIGCONT)
            answer = _wait(job["resume"], None)
        else:
            pid = os.fork()
            if pid == 0:
                _child(job)
            answer = _wait(pid, job["kill_after"])
        print(json.dumps(answer), flush=True)


def _wait(pid: int, kill_after: float | None) -> dict[str, Any]:
    started = time.monotonic()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"pid": pid, "code": None, "seconds": 0.0}
    code = os.waitstatus_to_exitcode(status)
    return {"pid": pid, "code": code, "seconds": time.monotonic() - started}


def _child(job: dict[str, Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['log']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from gptoss_convert.cli import main
    from gptoss_plugins.huggingface import sink

    sink.SHARD_BYTES = job["shard_bytes"] or sink.SHARD_BYTES
    calls = _watch(job)
    sys.argv = ["gptoss-convert", *job["argv"]]
    code: Any = 70
    try:
        main(job["argv"], prog_name="gptoss-convert")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(f"{job['log']}.calls").write_text("\n".join(calls))
        os._exit(code)


def _watch(job: dict[str, Any]) -> list[str]:
    """Count the steps; send a signal at step ``at``, or fail from there on."""
    calls: list[str] = []
    numbers = itertools.count(1)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def step(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            number = next(numbers)
            if job["what"] == "fail" and 0 < job["at"] <= number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if job["what"] != "fail" and job["at"] == number:
                if job["what"] == "SIGKILL" and name == "pwrite":  # half of the bytes get through
                    fd, data, offset = arguments
                    real(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), getattr(signal, job["what"]))
            return real(*arguments, **options)

        return step

    for name in job["steps"]:
        setattr(os, name, watched(name))
    return calls


if __name__ == "__main__":
    serve()
    sys.exit()


@dataclass(frozen=True)
class Ended:
    """How a run went: ``code`` is negative for a signal, None for one that stands still."""

    code: int | None
    stderr: str
    calls: tuple[str, ...]
    seconds: float
    pid: int

    def at(self, name: str, which: int) -> int:
        """Number of the ``which``-th step called ``name``, for another run to do something there."""
        return [n for n, call in enumerate(self.calls, 1) if call == name][which]


class Runner:
    """Talks to the server."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        *argv: object,
        at: int = 0,
        what: str = "SIGKILL",
        kill_after: float | None = None,
        shard_bytes: int | None = None,
        steps: tuple[str, ...] = STEPS,
        workers: int = 1,
    ) -> Ended:
        """Run a command, and at step ``at`` of it do ``what``.

        Args:
            argv: the command line.
            at: the step's number, from 1; 0 disturbs nothing.
            what: a signal's name, or ``fail`` for input/output errors from there on.
            kill_after: seconds until a SIGKILL from outside.
            shard_bytes: how much an exported shard may hold.
            steps: the functions of ``os`` that count.
            workers: as on the command line.

        """
        (path := Path(f"{self._log}.calls")).unlink(missing_ok=True)
        answer = self._ask(
            argv=[*map(str, argv), "--workers", str(workers)],
            at=at,
            what=what,
            kill_after=kill_after,
            shard_bytes=shard_bytes,
            steps=steps,
            log=str(self._log),
        )
        calls = path.read_text().split() if path.exists() else ()
        return self._ended(answer, tuple(calls))

    def resume(self, stopped: Ended) -> Ended:
        """Let a run that stands still go on."""
        return self._ended(self._ask(resume=stopped.pid), ())

    def _ended(self, answer: dict[str, Any], calls: tuple[str, ...]) -> Ended:
        stderr = Path(f"{self._log}.err").read_text()
        return Ended(answer["code"], stderr, calls, answer["seconds"], answer["pid"])

    def _ask(self, **job: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server died"
        return json.loads(line)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    found = Runner(tmp_path_factory.mktemp("logs") / "run")
    yield found
    found.close()


# ---- a conversion to disturb, and what must hold after every disturbance


@dataclass
class Job:
    """A conversion whose target is ``out`` in a folder of its own.

    ``whole`` is the tree of an undisturbed run's target, ``base`` how that run went.
    """

    runner: Runner
    tree: Tree
    command: list[Any]
    flag: str
    parent: Path
    options: dict[str, Any]

    def __post_init__(self) -> None:
        elsewhere = self.parent / "undisturbed"
        elsewhere.mkdir(parents=True)
        self.base = self.runner(*self.command, self.flag, elsewhere / "out", **self.options)
        assert self.base.code == 0, self.base.stderr
        self.whole = self.tree(elsewhere / "out")
        assert self.tree(elsewhere).keys() == {"out"} | {f"out/{name}" for name in self.whole}

    @property
    def target(self) -> Path:
        return self.parent / "place" / "out"

    def clear(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()

    def run(self, *more: object, **how: Any) -> Ended:
        return self.runner(*self.command, self.flag, self.target, *more, **self.options | how)

    def leftovers(self) -> list[Path]:
        """All but the target."""
        return [path for path in self.target.parent.iterdir() if path != self.target]

    def assert_whole(self) -> None:
        """The target is the undisturbed run's, and there is nothing beside it."""
        found = self.tree(self.target.parent)
        assert found == {"out": "folder"} | {f"out/{n}": d for n, d in self.whole.items()}

    def assert_nothing_wrong(self, *allowed: dict[str, str]) -> None:
        """What is there is whole, or every command refuses it."""
        for path in self.target.parent.iterdir():
            if path == self.target and not any(path.iterdir()):
                continue
            for folder in (path, path / "iter_0000000"):
                if folder.is_dir() and accepted(folder):
                    found = weights(self.tree(path))
                    assert found in [weights(w) for w in (self.whole, *allowed)], f"{path} is wrong"
        if self.target.exists() and any(self.target.iterdir()):
            assert self.tree(self.target) in (self.whole, *allowed)


def weights(tree: dict[str, str]) -> dict[str, str]:
    """Files with tensors, and what says where in them each is."""
    kept = (".distcp", ".metadata", ".safetensors", "safetensors.index.json", "config.json")
    return {name: digest for name, digest in tree.items() if name.endswith(kept)}


def accepted(folder: Path) -> bool:
    """Whether ``inspect`` finds nothing wrong with a folder, or a conversion would start from it."""
    from gptoss_convert.convert import Choice, open_source, prepare_export, prepare_import
    from gptoss_convert.errors import ConvertError
    from gptoss_convert.inspection import inspect_source
    from gptoss_convert.registry import default_registry

    found = 0
    with contextlib.suppress(ConvertError):
        found += not inspect_source(open_source(folder), default_registry(), Choice())["problems"]
    for prepare in (prepare_import, prepare_export):
        with contextlib.suppress(ConvertError):
            prepare(folder).source.check()
            found += 1
    return found > 0


@pytest.fixture(scope="module")
def imports(runner: Runner, tree: Tree, originals: dict[str, Path], tmp_path_factory: Any) -> Job:
    command = ["import", "--hf-model", originals["mxfp4"]]
    return Job(runner, tree, command, "--megatron-path", tmp_path_factory.mktemp("imports"), {})


@pytest.fixture(scope="module")
def exports(runner: Runner, tree: Tree, imported: Path, tmp_path_factory: Any) -> Job:
    """To several shards, so that some can be finished while others are not."""
    command = ["export", "--megatron-path", imported]
    options = {"shard_bytes": 200_000}
    job = Job(runner, tree, command, "--hf-path", tmp_path_factory.mktemp("exports"), options)
    assert sum(name.endswith(".safetensors") for name in job.whole) >= 4
    return job


@pytest.fixture(scope="module")
def long_imports(runner: Runner, tree: Tree, write_tiny: Any, tmp_path_factory: Any) -> Job:
    """Long enough for a random moment to be in the middle of something."""
    folder = tmp_path_factory.mktemp("long")
    layers = ["sliding_attention", "full_attention"] * 4
    sizes = {"num_hidden_layers": 8, "layer_types": layers, "num_local_experts": 8}
    source = write_tiny(folder / "hf", mxfp4=True, shards=5, **sizes)
    return Job(runner, tree, ["import", "--hf-model", source], "--megatron-path", folder, {})


@pytest.fixture(params=["imports", "exports"])
def job(request: pytest.FixtureRequest) -> Job:
    """Either direction, its place empty."""
    found: Job = request.getfixturevalue(request.param)
    found.clear()
    return found


# ---- kill -9


def assert_survives(job: Job, ended: Ended) -> None:
    """After a kill: nothing wrong is there, and the same command makes it whole."""
    assert ended.code in (0, -signal.SIGKILL), ended.stderr
    job.assert_nothing_wrong()
    more = ["--overwrite"] if job.target.exists() else []
    again = job.run(*more)
    assert again.code == 0, again.stderr
    job.assert_whole()


@pytest.mark.slow
def test_kill_at_every_step_of_an_import(imports: Job) -> None:
    """Its later mkdirs left out: they find their folder there."""
    steps = [n for n, name in enumerate(imports.base.calls, 1) if name != "mkdir" or n < 20]
    assert len(steps) > 60
    for at in steps:
        imports.clear()
        ended = imports.run(at=at)
        assert ended.code == -signal.SIGKILL
        assert_survives(imports, ended)


@pytest.mark.slow
def test_kill_at_steps_of_an_export(exports: Job) -> None:
    for at in range(1, len(exports.base.calls) + 1, 3):
        exports.clear()
        ended = exports.run(at=at)
        assert ended.code == -signal.SIGKILL
        assert_survives(exports, ended)


@pytest.mark.slow
def test_kill_at_random_moments_of_an_import(long_imports: Job) -> None:
    """50 of them over the whole run, two workers writing side by side."""
    moments = random.Random(20)
    long_imports.clear()
    seconds = min(long_imports.run("--overwrite", workers=2).seconds for _ in range(3))
    killed = unfinished = 0
    for _ in range(50):
        long_imports.clear()
        ended = long_imports.run(kill_after=moments.uniform(0, seconds), workers=2)
        killed += ended.code == -signal.SIGKILL
        unfinished += bool(long_imports.leftovers())
        assert_survives(long_imports, ended)
    assert killed >= 30
    assert unfinished >= 12


@pytest.mark.slow
def test_kill_again_and_again(long_imports: Job) -> None:
    """Runs that each get a little further come to the same end."""
    long_imports.clear()
    moments = random.Random(3)
    for _ in range(12):
        at = moments.randrange(10, 40)
        ended = long_imports.run(at=at, workers=moments.choice([1, 2, 3]))
        long_imports.assert_nothing_wrong()
        if ended.code == 0:
            break
    if ended.code != 0:
        assert long_imports.run().code == 0
    long_imports.assert_whole()


PROGRAM = Path(sysconfig.get_path("scripts")) / "gptoss-convert"


def start(job: Job) -> subprocess.Popen[bytes]:
    """The command in a process as users have it, at the moment when its work begins."""
    job.clear()
    command = [PROGRAM, *job.command, job.flag, job.target]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not job.leftovers():
        time.sleep(0.001)
    return process


@pytest.mark.slow
def test_kill_a_real_process(long_imports: Job) -> None:
    moments = random.Random(4)
    codes = set()
    for _ in range(3):
        process = start(long_imports)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        codes.add(process.returncode)
        assert_survives(long_imports, Ended(process.returncode, "", (), 0, process.pid))
    assert -signal.SIGKILL in codes


# ---- going on


def test_finished_parts_are_not_made_again(job: Job) -> None:
    """The same files, not just the same bytes; and the user is told."""
    ended = job.run(at=job.base.at("rename", 5))  # dies before the third part has its name
    assert ended.code == -signal.SIGKILL
    (staging,) = job.leftovers()
    assert len(list(staging.glob(".sums-*"))) == 3  # a part's note has its name before the part
    kept = {
        p.name: p.stat().st_ino
        for p in staging.rglob("*")
        if p.suffix in (".distcp", ".safetensors")
    }
    assert len(kept) == 2
    again = job.run()
    assert again.code == 0
    assert f"going on with the unfinished {staging}" in again.stderr
    made = {p.name: p.stat().st_ino for p in job.target.rglob("*") if p.name in kept}
    assert made == kept
    job.assert_whole()


def test_unfinished_target_is_said_to_be_unfinished(job: Job, invoke: Run) -> None:
    assert job.run(at=job.base.at("rename", 2)).code == -signal.SIGKILL
    back = "--megatron-path" if job.flag == "--megatron-path" else "--hf-model"
    for command in (
        ["inspect", job.target],
        ["export", back, job.target, "--hf-path", job.parent / "no"]
        if back == "--megatron-path"
        else ["import", back, job.target, "--megatron-path", job.parent / "no"],
        ["plan", back, job.target],
    ):
        done = invoke(*command)
        assert done.returncode == 5, (command, done.stderr)
        assert done.stderr.count("\n") == 1
        assert "did not finish; run the same command again" in done.stderr


def test_unfinished_target_with_a_short_relative_name(
    imports: Job, invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``place/out`` could be a hub id, but its unfinished work lies here."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    imports.clear()
    assert imports.run(at=imports.base.at("rename", 2)).code == -signal.SIGKILL
    monkeypatch.chdir(imports.parent)
    for command in (["inspect", "place/out"], ["plan", "--megatron-path", "place/out"]):
        done = invoke(*command)
        assert done.returncode == 5, done.stderr


def test_another_option_starts_afresh(imports: Job) -> None:
    imports.clear()
    wide = imports.run("--torch-dtype", "float32")
    assert wide.code == 0
    whole = imports.tree(imports.target)
    assert whole != imports.whole
    imports.clear()
    assert imports.run(at=imports.base.at("rename", 3)).code == -signal.SIGKILL
    again = imports.run("--torch-dtype", "float32")
    assert again.code == 0
    assert "going on" not in again.stderr
    assert imports.tree(imports.target) == whole
    assert imports.leftovers() == []


def test_another_source_starts_afresh(
    runner: Runner, tree: Tree, write_tiny: Any, tmp_path: Path
) -> None:
    """The same name with other weights of the same size, as after a repaired download."""
    source = write_tiny(tmp_path / "hf", seed=1)
    other = write_tiny(tmp_path / "other", seed=2)
    command = ["import", "--hf-model", source]
    job = Job(runner, tree, command, "--megatron-path", tmp_path / "work", {})
    job.clear()
    assert job.run(at=job.base.at("rename", 3)).code == -signal.SIGKILL
    shutil.rmtree(source)
    other.rename(source)
    again = job.run()
    assert again.code == 0
    assert "going on" not in again.stderr
    direct = tmp_path / "direct"
    assert runner(*command, "--megatron-path", direct).code == 0
    assert tree(direct) == tree(job.target) != job.whole
    assert job.leftovers() == []


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_do_not_change_a_byte(workers: int, job: Job) -> None:
    assert job.run(workers=workers).code == 0
    job.assert_whole()


def test_resumed_with_other_workers(job: Job) -> None:
    assert job.run(at=job.base.at("rename", 1), workers=3).code == -signal.SIGKILL
    assert job.run(workers=5).code == 0
    job.assert_whole()


# ---- SIGINT


@pytest.mark.parametrize(
    "where", ["mkdir 0", "pwrite 0", "pwrite 2", "rename 1", "fsync -9", "rename -1"]
)
def test_interrupted(where: str, job: Job) -> None:
    name, which = where.split()
    ended = job.run(at=job.base.at(name, int(which)), what="SIGINT")
    assert ended.code == 130, ended.stderr
    assert ended.stderr.strip() == "interrupted; run the same command again to go on"
    job.assert_nothing_wrong()
    again = job.run(*(["--overwrite"] if job.target.exists() else []))
    assert again.code == 0, again.stderr
    job.assert_whole()


@pytest.mark.slow
def test_interrupt_a_real_process(long_imports: Job) -> None:
    for _ in range(5):
        process = start(long_imports)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        if process.returncode != 0:  # 0: it was too quick for us
            break
    assert process.returncode == 130, stderr
    assert stderr.endswith(b"interrupted; run the same command again to go on\n")
    assert b"Traceback" not in stderr
    assert long_imports.run().code == 0
    long_imports.assert_whole()


# ---- a disk that fails


def test_failing_disk_keeps_what_is_done(job: Job) -> None:
    ended = job.run(at=3, what="fail", steps=("pwrite",))
    assert ended.code == 5, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "Input/output error" in ended.stderr
    assert "2 of " in ended.stderr
    assert "run the same command again" in ended.stderr
    assert not job.target.exists()
    assert job.run().code == 0
    job.assert_whole()


def test_failing_disk_at_the_first_byte(job: Job) -> None:
    """Nothing was done, so nothing is kept and no one is told to go on."""
    ended = job.run(at=1, what="fail", steps=("pwrite",))
    assert ended.code in (1, 5), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "Input/output error" in ended.stderr
    assert "to go on" not in ended.stderr
    assert list(job.target.parent.iterdir()) == []


def test_source_that_fails(imports: Job) -> None:
    """Not at once: what was written stays for the next try."""
    imports.clear()
    reads = imports.run(steps=("preadv",)).calls
    imports.clear()
    ended = imports.run(at=len(reads) // 2, what="fail", steps=("preadv",))
    assert ended.code == 5, ended.stderr
    assert "Input/output error" in ended.stderr
    assert not imports.target.exists()
    assert imports.run().code == 0
    imports.assert_whole()


# ---- two at once


@pytest.mark.parametrize("where", ["posix_fallocate 0", "pwrite 2", "fsync -3"])
@pytest.mark.parametrize(
    "more", [[], ["--overwrite"], ["dtype"]], ids=["same", "overwrite", "other"]
)
def test_second_run_is_refused(where: str, more: list[str], job: Job) -> None:
    if more == ["dtype"]:
        more = ["--torch-dtype" if job.command[0] == "import" else "--export-dtype", "float32"]
        more[1] = more[1] if job.command[0] == "import" else "fp32"
    name, which = where.split()
    first = job.run(at=job.base.at(name, int(which)), what="SIGSTOP")
    assert first.code is None
    before = job.tree(job.target.parent)
    second = job.run(*more)
    after = job.tree(job.target.parent)
    ended = job.runner.resume(first)
    assert second.code == 1, second.stderr
    *warnings, error = second.stderr.splitlines()
    assert len(warnings) == len(more) // 2
    assert error.startswith(f"error: {job.target}: another run is writing to it; ")
    assert after == before
    assert ended.code == 0
    job.assert_whole()


def test_target_that_came_meanwhile_is_not_replaced(job: Job) -> None:
    """It was absent when the slow run looked, and is not when the slow run begins."""
    slow = job.run(at=1, what="SIGSTOP")
    assert slow.code is None
    assert job.leftovers() == [], "it was stopped too late for this test"
    wide = "--torch-dtype" if job.command[0] == "import" else "--export-dtype"
    assert job.run(wide, {"--torch-dtype": "float32"}.get(wide, "fp32")).code == 0
    other = job.tree(job.target)
    assert other != job.whole
    ended = job.runner.resume(slow)
    assert job.tree(job.target) == other
    assert ended.code == 1, ended.stderr
    assert "not empty" in ended.stderr
    assert job.leftovers() == []


@pytest.mark.parametrize("name", ["ou?", "*", "[o]ut"])
def test_pattern_for_a_name_does_not_reach_other_targets(name: str, job: Job) -> None:
    """The unfinished work of ``out`` is nothing to do with a target whose name would match it."""
    assert job.run(at=job.base.at("rename", 2)).code == -signal.SIGKILL
    before = job.tree(job.target.parent)
    other = job.target.with_name(name)
    wide = {"import": ["--torch-dtype", "float32"], "export": ["--export-dtype", "fp32"]}
    more = wide[job.command[0]]
    assert job.runner(*job.command, job.flag, other, *more, **job.options).code == 0
    shutil.rmtree(other)
    assert job.tree(job.target.parent) == before
    assert job.runner(*job.command, job.flag, other, at=30, **job.options).code < 0
    again = job.runner(*job.command, job.flag, other, **job.options)
    assert again.code == 0
    assert job.tree(other) == job.whole
    assert "going on" in again.stderr
    shutil.rmtree(other)
    assert job.tree(job.target.parent) == before


def test_empty_target_is_filled(job: Job) -> None:
    job.target.mkdir()
    assert job.run(at=job.base.at("rename", 3)).code == -signal.SIGKILL
    assert list(job.target.iterdir()) == []
    assert job.run().code == 0
    job.assert_whole()


# ---- --overwrite


@pytest.fixture
def replacing(job: Job) -> Iterator[dict[str, str]]:
    """The target holds an older result and a user's note; yields its tree."""
    make_old(job)
    return job.tree(job.target)


def make_old(job: Job) -> None:
    """Put an older result with a user's note in it where the target is to be."""
    job.clear()
    old = job.parent / "old"
    if not old.exists():
        importing = job.command[0] == "import"
        wide = ["--torch-dtype", "float32"] if importing else ["--export-dtype", "fp32"]
        assert job.run(*wide).code == 0
        (job.target / "notes").mkdir()
        (job.target / "notes" / "mine.txt").write_text("precious")
        job.target.rename(old)
    shutil.copytree(old, job.target)


def test_overwrite_replaces_all_of_it(job: Job, replacing: dict[str, str]) -> None:
    assert replacing != job.whole
    refused = job.run()
    assert refused.code == 1
    assert job.tree(job.target) == replacing
    assert job.run("--overwrite").code == 0
    job.assert_whole()


def test_overwrite_that_fails_leaves_the_old(job: Job, replacing: dict[str, str]) -> None:
    ended = job.run("--overwrite", at=1, what="fail", steps=("pwrite",))
    assert ended.code in (1, 5)
    assert job.tree(job.target) == replacing
    assert job.leftovers() == []


def from_publishing(job: Job) -> Iterator[int]:
    """Numbers of the steps of a replacing run, from the sync before its two renames on."""
    make_old(job)
    done = job.run("--overwrite")
    assert done.code == 0
    yield from range(done.at("rename", -2) - 1, len(done.calls) + 1)


@pytest.mark.slow
def test_kill_while_replacing(job: Job) -> None:
    """At any moment either the old or the new is whole, and no folder is half of one."""
    steps = [*from_publishing(job)]
    for at in steps[:6] + steps[6:-2:5] + steps[-2:]:
        make_old(job)
        old = job.tree(job.target)
        assert job.run("--overwrite", at=at).code == -signal.SIGKILL
        job.assert_nothing_wrong(old)
        trees = [job.tree(path) for path in job.target.parent.iterdir()]
        assert old in trees or job.whole in trees
        again = job.run("--overwrite")
        assert again.code == 0, again.stderr
        job.assert_whole()


def test_crash_between_the_renames_does_not_give_leave_to_replace(
    job: Job, replacing: dict[str, str]
) -> None:
    """The old is only out of the way; without --overwrite it must not go."""
    between = [*from_publishing(job)][2]
    make_old(job)
    assert job.run("--overwrite", at=between).code == -signal.SIGKILL
    assert not job.target.exists()
    ended = job.run()
    trees = [job.tree(path) for path in job.target.parent.iterdir()]
    assert replacing in trees, f"the old is gone (exit code {ended.code})"


def test_killed_after_the_renames_is_done(job: Job, replacing: dict[str, str]) -> None:
    """The target is new and whole; the rest of the old goes with the next run."""
    after = [*from_publishing(job)][3]
    make_old(job)
    assert job.run("--overwrite", at=after).code == -signal.SIGKILL
    assert job.tree(job.target) == job.whole
    assert job.run("--overwrite").code == 0
    job.assert_whole()


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_second_run_while_replacing(step: int, job: Job, replacing: dict[str, str]) -> None:
    """The first stands still between its renames or in its clean-up; the second disturbs nothing."""
    at = [*from_publishing(job)][step]
    make_old(job)
    first = job.run("--overwrite", at=at, what="SIGSTOP")
    assert first.code is None
    second = job.run("--overwrite")
    ended = job.runner.resume(first)
    assert ended.code == 0, (second, ended.stderr)
    assert second.code in (0, 1), second.stderr
    job.assert_whole()
