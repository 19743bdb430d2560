"""``launch slurm`` on a real cluster: what arrives, what is shown, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Cluster = Any  # of conftest.py, which cannot be imported by its name

pytestmark = pytest.mark.slurm


def test_follow_shows_the_log_and_ends_as_the_command_does(
    cluster: Cluster, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / 'it\'s "here" 100%j $(touch hacked)'
    words = ["verify", originals["bf16"], originals["bf16-square"]]
    options = ["--follow", "--job-dir", folder, "--name", "a 'b' $c", "--env", "A=$(touch hacked)"]
    found = cluster.run("gptoss-convert", "launch", "slurm", *options, "--", *words)
    assert found.returncode == 3, found.stderr
    direct = cluster.run("gptoss-convert", *words)
    assert direct.stdout.strip().splitlines()[0] in found.stdout
    assert sorted(path.suffix for path in folder.iterdir()) == [".log", ".sbatch"]
    assert not any(tmp_path.glob("**/hacked"))
    assert not (cluster.folder / "hacked").exists()


def test_a_conversion_in_several_processes_on_two_nodes(
    cluster: Cluster,
    originals: dict[str, Path],
    imported: Path,
    tmp_path: Path,
    content: Callable[[Path], dict[str, str]],
) -> None:
    target = tmp_path / "m"
    job = cluster.launch(
        *("--nodes", 2, "--nproc-per-node", 2, "--", "import"),
        *("--hf-model", originals["bf16"], "--megatron-path", target),
    )
    log = cluster.completed(job["job"])
    assert "of 4 has done its share" in log
    assert content(target) == content(imported)
    assert Path(job["log"]).read_text() == log
    assert Path(job["script_file"]).read_text() == job["script"]


@pytest.mark.slow
def test_tasks_of_an_array(cluster: Cluster, originals: dict[str, Path], tmp_path: Path) -> None:
    for number, name in enumerate(("bf16", "mxfp4"), start=3):
        (tmp_path / f"model {number}").symlink_to(originals[name])
    job = cluster.launch(
        *("--array", "3,4", "--job-dir", tmp_path / "jobs"),
        *("--", "inspect", tmp_path / "model %a", "--json"),
    )
    shown = {}
    for number in (3, 4):
        log = cluster.completed(f"{job['job']}_{number}")
        assert Path(job["log"].replace("%a", str(number))).read_text() == log
        shown[number] = json.loads(log[log.index("{") :])
    assert "U8" not in shown[3]["bytes_by_dtype"]
    assert "U8" in shown[4]["bytes_by_dtype"]


def test_what_slurm_refuses_is_told(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--partition", "nowhere", "--job-dir", tmp_path / "jobs"]
    found = cluster.run("gptoss-convert", "launch", "slurm", *options, "--", "verify", "a", "b")
    assert found.returncode == 1
    assert "invalid partition specified: nowhere" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--follow", "--job-dir", tmp_path, "--sbatch", "begin=now+1hour"]
    command = ["gptoss-convert", "launch", "slurm", *map(str, options), "--", "verify", "a"]
    with subprocess.Popen(
        command, env=cluster.environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stderr
        number = process.stderr.readline().split()[2].rstrip(";")
        assert process.stderr.readline() == f"job {number}: pending (BeginTime)\n"
        process.send_signal(signal.SIGINT)
        assert f"job {number} goes on; scancel {number} ends it" in process.stderr.read()
    assert process.returncode == 130
    assert cluster.facts(number)["JobState"] == "PENDING"
    assert cluster.run("scancel", number).returncode == 0
