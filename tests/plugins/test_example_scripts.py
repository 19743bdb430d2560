"""The scripts of examples/ in a job of a Slurm that only writes down what it is told to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fake_slurm import job_of

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = ("slurm_pretrain.sh", "slurm_sft.sh", "slurm_peft.sh")


def steps(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """The steps that a script starts, on two nodes of three GPUs; none of them finds a file."""
    job = job_of(folder, 'printf "%s\\0" "$@" >>"$SEEN"; printf "\\n\\0" >>"$SEEN"')
    around = {**job, "SLURM_GPUS_ON_NODE": "3", **variables}
    done = subprocess.run(
        ["bash", EXAMPLES / script],
        env=around,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        step.strip("\0").split("\0") for step in Path(job["SEEN"]).read_text().split("\0\n\0")[:-1]
    ]


def trainings(script: str, folder: Path, **variables: str) -> list[list[str]]:
    return [step for step in steps(script, folder, **variables) if "--recipe" in step]


@pytest.mark.parametrize("script", TRAINING)
def test_layouts_and_overrides_may_stand_on_several_lines(script: str, tmp_path: Path) -> None:
    found = trainings(
        script, tmp_path, LAYOUTS="2,1,4\n3 1,2,1,5,True", OVERRIDES="a.b=1\n c.d=2\n"
    )
    sizes = [(2, 1, 4, 1, True), (3, 1, 1, 1, True), (1, 2, 1, 5, False)]
    assert len(found) == len(sizes)
    for step, (tp, pp, ep, cp, sp) in zip(found, sizes, strict=True):
        assert {
            f"model.tensor_model_parallel_size={tp}",
            f"model.pipeline_model_parallel_size={pp}",
            f"model.expert_model_parallel_size={ep}",
            f"model.context_parallel_size={cp}",
            f"model.sequence_parallel={sp}",
            "--nproc_per_node=3",  # a rank on each of the GPUs that Slurm gives
        } <= set(step)
        assert step[-2:] == ["a.b=1", "c.d=2"]


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize(("model", "most"), [("20b", 4), ("120b", 16), ("tiny", 1)])
def test_each_model_has_its_layouts(script: str, model: str, most: int, tmp_path: Path) -> None:
    found = trainings(script, tmp_path, MODEL=model)
    name = "model.expert_model_parallel_size="
    sizes = [int(w.removeprefix(name)) for step in found for w in step if w.startswith(name)]
    assert 1 <= len(sizes) == len(found)
    assert max(sizes) <= most
    assert all(f"{model}_" in step[step.index("--recipe") + 1] for step in found)


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.sh")))
def test_a_container_has_the_workspace(script: str, tmp_path: Path) -> None:
    found = steps(script, tmp_path, CONTAINER_IMAGE="an image", WORKSPACE="w s", MODEL="120b")
    assert found
    here = tmp_path / "w s"
    for step in found:
        assert {"--container-image=an image", f"--container-mounts={here}:{here}"} <= set(step)
    (tmp_path / "again").mkdir()
    mounts = "/a:/b,/c d"
    for step in steps(script, tmp_path / "again", CONTAINER_IMAGE="i", CONTAINER_MOUNTS=mounts):
        assert f"--container-mounts={mounts}" in step


def test_text_comes_from_what_is_named_or_there(tmp_path: Path) -> None:
    found = steps("inference.sh", tmp_path, HF_MODEL="none", SFT_CHECKPOINT="/my run", MODEL="120b")
    said = [step for step in found if "generate" in step]
    assert len(said) == 1
    assert said[0][said[0].index("--megatron-path") + 1] == "/my run"


@pytest.mark.parametrize("script", [*TRAINING, "pack_data_job.sh"])
def test_what_takes_a_job_says_so(script: str, tmp_path: Path) -> None:
    path = EXAMPLES / script
    around = {"PATH": os.environ["PATH"]}
    found = subprocess.run(
        ["bash", path], env=around, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode
    assert f"submit this: sbatch examples/{script}" in found.stderr
    assert not found.stdout
