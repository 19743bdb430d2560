"""The scripts of examples/, as they are, on a real Slurm cluster of two nodes, by environment variables."""

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

SAMPLES = 30
STEPS = 4
TINY = {
    "MODEL": "tiny",
    "SEQ_LENGTH": 96,
    "TRAIN_ITERS": STEPS,
    "GLOBAL_BATCH_SIZE": 4,
    "LR_WARMUP_ITERS": 2,
    "EVAL_ITERS": 0,
    "SAVE_INTERVAL": 3,
}
ON_TWO = ("--nodes=2", "--gpus-per-node=0")
PROMPT = 'He said "no", $(touch hacked)  it\'s'


def losses(path: Path) -> list[float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def alone(run_cli: Callable[..., Any], folder: Path, *words: object) -> list[float]:
    """The losses of the same training by one process."""
    log = folder / "alone.jsonl"
    log.unlink(missing_ok=True)
    few = (
        *("model.seq_length=96", "dataset.sequence_length=96", f"train.train_iters={STEPS}"),
        *("train.global_batch_size=4", "scheduler.lr_warmup_iters=2", "train.eval_iters=0"),
        *("checkpoint.save=null", "checkpoint.load=null", "logger.log_interval=1"),
    )
    found = run_cli(*words, *few, f"logger.log_file={log}", "logger.tensorboard_dir=null")
    assert found.returncode == 0, found.stderr
    return losses(log)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work space")  # with a blank


@pytest.fixture(scope="module")
def pretrained(cluster: Cluster, workspace: Path, run_cli: Callable[..., Any]) -> Path:
    """By slurm_pretrain.sh on DCLM's form, in two layouts in turn; the first one's results."""
    texts = workspace / "text.jsonl"
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    texts.write_text("\n".join(json.dumps({"text": page.read_text()}) for page in pages))
    dclm = workspace / "dclm"
    prefix = dclm / "dclm_01_text_document"
    dclm.mkdir()
    made = run_cli(
        "data", "preprocess", "--input", texts, "--output-prefix", prefix, "--byte-level"
    )
    assert made.returncode == 0, made.stderr
    where = {"DCLM_DATA_DIR": dclm, "DCLM_CACHE": workspace / "cache"}
    job = cluster.submit(
        "slurm_pretrain.sh",
        *ON_TWO,
        WORKSPACE=workspace,
        LAYOUTS="1,1,2,1 1,1,1,1",
        MICRO_BATCH_SIZE=2,
        **TINY,
        **where,
    )
    log = cluster.completed(job)
    results = workspace / "results"
    runs = [results / f"gpt_oss_tiny_pretrain_tp1_pp1_ep{ep}_spFalse_cp1" for ep in (2, 1)]
    assert log.count(f"trained {STEPS} of {STEPS} steps") == 2
    one = alone(
        run_cli, workspace, "pretrain", "--recipe", "tiny", f"dataset.blend=[{prefix}]",
        "train.micro_batch_size=2",
    )  # fmt: skip
    assert len(set(one)) == STEPS
    for run in runs:
        assert losses(run.with_suffix(".jsonl")) == pytest.approx(one, abs=1e-4)
        assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == str(STEPS)
    return runs[0]


@pytest.fixture(scope="module")
def packed(cluster: Cluster, workspace: Path) -> Path:
    """By pack_data_job.sh; returns what it was made of."""
    samples = workspace / "samples.jsonl"
    rows = [
        {"question": f"{n} and {n * n}?", "answer": f" {n + n * n}."} for n in range(3, 3 + SAMPLES)
    ]
    samples.write_text("\n".join(map(json.dumps, rows)))
    options = "--prompt-key question --completion-key answer"
    job = cluster.submit(
        "pack_data_job.sh",
        "--cpus-per-task=2",
        WORKSPACE=workspace,
        MODEL="tiny",
        DATASET_NAME="mine",
        INPUT=samples,
        SEQ_LENGTH=96,
        OPTIONS=options,
    )
    cluster.completed(job)
    assert (workspace / "data" / "mine_96_pad1.parquet").is_file()
    return samples


def finetuned(cluster: Cluster, kind: str, workspace: Path, pretrained: Path) -> tuple[str, Path]:
    """By slurm_sft.sh or slurm_peft.sh, on the file that is packed already: the log, and the results."""
    job = cluster.submit(
        f"slurm_{kind}.sh",
        *ON_TWO,
        WORKSPACE=workspace,
        LAYOUTS="1,1,2,1",
        DATASET_NAME="mine",
        PRETRAINED_CHECKPOINT=pretrained,
        OVERRIDES="dataset.val_proportion=0.0\n logger.log_interval=1",
        **TINY,
    )
    log = cluster.completed(job)
    what = {"sft": "finetune", "peft": "lora"}[kind]
    return log, workspace / "results" / f"gpt_oss_tiny_mine_{what}_tp1_pp1_ep2_spFalse_cp1"


def of_samples(samples: Path, pretrained: Path, lr: float) -> list[str]:
    return [
        *(f"dataset.dataset_root={samples}", "dataset.prompt_key=question"),
        *("dataset.completion_key=answer", "dataset.val_proportion=0.0"),
        *("train.micro_batch_size=1", f"optimizer.lr={lr}", "optimizer.min_lr=0"),
        f"checkpoint.pretrained_checkpoint={pretrained}",
    ]


@pytest.fixture(scope="module")
def sft(
    cluster: Cluster, workspace: Path, pretrained: Path, packed: Path, run_cli: Callable[..., Any]
) -> Path:
    log, results = finetuned(cluster, "sft", workspace, pretrained)
    assert f"trained {STEPS} of {STEPS} steps" in log
    words = of_samples(packed, pretrained, 5e-6)  # packed anew, by the training itself
    one = alone(run_cli, workspace, "sft", "--recipe", "tiny", *words)
    assert len(set(one)) == STEPS
    assert losses(results.with_suffix(".jsonl")) == pytest.approx(one, abs=1e-4)
    return results


@pytest.fixture(scope="module")
def adapter(
    cluster: Cluster, workspace: Path, pretrained: Path, packed: Path, run_cli: Callable[..., Any]
) -> Path:
    log, results = finetuned(cluster, "peft", workspace, pretrained)
    assert f"trained {STEPS} of {STEPS} steps" in log
    words = [*of_samples(packed, pretrained, 1e-4), "peft.dim=32", "peft.alpha=32"]
    one = alone(run_cli, workspace, "peft", "--recipe", "tiny", *words)
    assert losses(results.with_suffix(".jsonl")) == pytest.approx(one, abs=1e-4)
    return results


def test_pretraining_packing_fine_tuning_and_what_is_said_then(
    cluster: Cluster,
    workspace: Path,
    pretrained: Path,
    sft: Path,
    adapter: Path,
    run_cli: Callable[..., Any],
) -> None:
    draws = ["--temperature", "1", "--seed", "5"]  # the most likely byte is a blank, always
    job = cluster.submit(
        "inference.sh",
        WORKSPACE=workspace,
        HF_MODEL="none",
        MEGATRON_MODEL_PATH=pretrained,
        SFT_CHECKPOINT=sft,
        ADAPTER=adapter,
        PROMPT=PROMPT,
        MAX_NEW_TOKENS=12,
        OPTIONS=" ".join(draws),
        TP=1,
        PP=2,
        EP=1,
    )
    log = cluster.completed(job)
    said = re.split(r"^== ", log, flags=re.MULTILINE)[1:]
    sources = {
        f"imported: {pretrained}": ["--megatron-path", pretrained],
        f"fine-tuned: {sft}": ["--megatron-path", sft],
        f"adapter: {adapter}": ["--megatron-path", pretrained, "--adapter", adapter],
    }
    assert len(said) == len(sources)
    for text, (what, options) in zip(said, sources.items(), strict=True):
        words = ["--prompt", PROMPT, "--max-new-tokens", 12, *draws]
        found = run_cli("generate", *options, *words)
        assert found.returncode == 0, found.stderr
        assert text.startswith(what)
        assert found.stdout.strip()
        assert found.stdout.strip() in text
    assert not any(Path(cluster.folder).glob("**/hacked"))


def test_a_preempted_conversion_starts_again(
    cluster: Cluster,
    originals: dict[str, Path],
    imported: Path,
    tmp_path: Path,
    content: Callable[[Path], dict[str, str]],
) -> None:
    job = cluster.submit(
        "conversion.sh",
        WORKSPACE=tmp_path,
        MODEL="mine",
        HF_MODEL=originals["bf16"],
        ROUNDTRIP="no",
    )
    cluster.until(lambda: cluster.facts(job)["JobState"] == "RUNNING", job)
    options = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    urgent = cluster.run("sbatch", "--parsable", *options, "--wrap", "true").stdout.strip()
    cluster.completed(urgent)
    cluster.completed(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert content(tmp_path / "models" / "gpt-oss-mine") == content(imported)


def test_a_conversion_is_split_over_two_nodes(
    cluster: Cluster,
    originals: dict[str, Path],
    tmp_path: Path,
    content: Callable[[Path], dict[str, str]],
    run_cli: Callable[..., Any],
) -> None:
    job = cluster.submit(
        "conversion.sh",
        "--nodes=2",
        WORKSPACE=tmp_path,
        MODEL="mine",
        HF_MODEL=originals["mxfp4"],
        EXPORT_DTYPE="mxfp4",
        TP=2,
        PP=1,
    )
    log = cluster.completed(job)
    assert re.search(r"process [01] of 2 has done its share", log)
    models = tmp_path / "models"
    one = tmp_path / "one"
    made = run_cli("import", "--hf-model", originals["mxfp4"], "--megatron-path", one)
    assert made.returncode == 0, made.stderr
    assert content(models / "gpt-oss-mine") == content(one)
    exported = models / "gpt-oss-mine-hf-export"
    same = run_cli("verify", exported, originals["mxfp4"], "--json")
    assert same.returncode == 0, same.stdout
    assert json.loads(same.stdout)["sound"]
    assert "error:" not in log
    made = {path.name for path in models.iterdir() if "finished" not in path.name}
    assert made == {"gpt-oss-mine", "gpt-oss-mine-hf-export"}
