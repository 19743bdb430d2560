"""Jobs that lose a node, are told to stop, or come near their time limit: nothing is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Cluster = Any  # of conftest.py, which cannot be imported by its name

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 24
PLACE = ("--nodes", "2", "--gpus-per-node", "0")
WORDS = (
    *("pretrain", "--recipe", "tiny", "model.seq_length=64", "dataset.sequence_length=64"),
    *("train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_iters=0"),
    *("scheduler.lr_warmup_iters=2", "logger.log_interval=1", "logger.tensorboard_dir=null"),
    *("checkpoint.save_interval=2", f"train.train_iters={STEPS}"),
)


def words(run: Path, *more: str) -> list[str]:
    where = [f"checkpoint.save={run}", f"checkpoint.load={run}", f"logger.log_file={run}.jsonl"]
    return ["--", *WORDS, *where, *more]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; of a step that was done twice, the second."""
    path = run.with_name(f"{run.name}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any]
) -> dict[int, float]:
    """By ``launch local``, on two processes."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    found = run_cli("launch", "local", "--nproc-per-node", 2, *words(run))
    assert found.returncode == 0, found.stderr
    assert len(set(losses(run).values())) == STEPS
    return losses(run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "a run"


def test_a_lost_node(cluster: Cluster, run: Path, undisturbed: dict[int, float]) -> None:
    job = cluster.launch(*PLACE, "--requeue", *words(run))["job"]
    cluster.until(lambda: len(losses(run)) >= 3, job)
    first, lost = re.match(r"(.*)\[(\d)-(\d)\]", cluster.facts(job)["NodeList"]).group(1, 3)  # type: ignore[union-attr]
    cluster.lose(first + lost)
    try:
        log = cluster.completed(job)
        facts = cluster.facts(job)
    finally:
        cluster.repair(first + lost)
    assert facts["Restarts"] == "1"
    assert lost not in facts["NodeList"]
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)
    assert f"trained {STEPS} of {STEPS} steps" in log
    assert log.count(f"step      1/{STEPS}  loss") == 1  # it went on, and did not begin anew


def test_scancel_saves_and_the_next_job_goes_on(
    cluster: Cluster, run: Path, undisturbed: dict[int, float]
) -> None:
    job = cluster.launch(*PLACE, "--requeue", *words(run))["job"]
    cluster.until(lambda: len(losses(run)) >= 2, job)
    assert cluster.run("scancel", job).returncode == 0
    facts = cluster.end(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("CANCELLED", "0:0")
    done = max(losses(run))
    assert 2 <= done < STEPS
    assert f"stopped after {done} of {STEPS} steps" in cluster.log(job)
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == str(done)
    again = cluster.run("gptoss-convert", "launch", "slurm", *PLACE, "--follow", *words(run))
    assert again.returncode == 0, again.stderr
    assert f"trained {STEPS} of {STEPS} steps" in again.stdout
    assert f"step {done:>6}/{STEPS}  goes on from {run}" in again.stdout
    assert f"step {done:>6}/{STEPS}  loss" not in again.stdout
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)


def test_near_the_time_limit_a_job_starts_again(
    cluster: Cluster, run: Path, undisturbed: dict[int, float]
) -> None:
    launched = cluster.launch(*PLACE, "--requeue", "--time", "20", *words(run))
    assert "--signal=B:USR1@300" in launched["script"]
    job = launched["job"]
    cluster.until(lambda: len(losses(run)) >= 2, job)
    told = cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does then
    assert told.returncode == 0, told.stderr
    log = cluster.completed(job)
    assert cluster.facts(job)["Restarts"] == "1"
    done = int(re.search(rf"stopped after (\d+) of {STEPS} steps", log).group(1))  # type: ignore[union-attr]
    assert 2 <= done < STEPS
    assert log.count(f"step {done:>6}/{STEPS}  loss") == 1
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)


def test_a_task_of_an_array_starts_again_alone(cluster: Cluster, tmp_path: Path) -> None:
    runs = [tmp_path / f"run {number}" for number in range(2)]
    place = ["--array", "0,1", "--gpus-per-node", "0", "--requeue", "--job-dir", tmp_path / "jobs"]
    job = cluster.launch(*place, *words(tmp_path / "run %a"))["job"]
    tasks = [f"{job}_{number}" for number in range(2)]
    cluster.until(lambda: all(len(losses(run)) >= 2 for run in runs), "")
    last = next(task for task in tasks if cluster.facts(task)["JobId"] == job)
    assert cluster.run("scancel", "--batch", "--signal=USR1", last).returncode == 0
    for task, run in zip(tasks, runs, strict=True):
        log = cluster.completed(task)
        assert f"trained {STEPS} of {STEPS} steps" in log
        assert ("stopped after" in log) == (task == last)
        assert cluster.facts(task)["Restarts"] == str(int(task == last))
        assert len(losses(run)) == STEPS


def test_a_preempted_job_starts_again(
    cluster: Cluster, run: Path, undisturbed: dict[int, float]
) -> None:
    job = cluster.launch(*PLACE, "--requeue", *words(run))["job"]
    cluster.until(lambda: len(losses(run)) >= 2, job)
    options = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    urgent = cluster.run("sbatch", "--parsable", *options, "--wrap", "true").stdout.strip()
    cluster.completed(urgent)
    log = cluster.completed(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert re.search(rf"stopped after \d+ of {STEPS} steps", log)  # saved, and not begun anew
    assert log.count(f"step      1/{STEPS}  loss") == 1
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)
