"""``train``: megatron-core's losses are transformers' own, in every layout and however often it stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXT = Path(__file__).parents[1] / "docs"  # any text will do
STEPS = 20
# overrides, ranks
IN_CI = ("ep2, overlapped",)
LAYOUTS = {
    "tp2": (["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"], 2),
    "pp2": (["model.pipeline_model_parallel_size=2"], 2),
    "pp2 vpp2": (
        [
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=2",
        ],
        2,
    ),
    "ep2": (["model.expert_model_parallel_size=2"], 2),
    "dp2": ([], 2),
    "cp2": (["model.context_parallel_size=2"], 2),
    "dp2, state in parts": (["optimizer.use_distributed_optimizer=true"], 2),
    "ep2, overlapped": (
        [
            "model.expert_model_parallel_size=2",
            "optimizer.use_distributed_optimizer=true",
            "ddp.overlap_grad_reduce=true",
            "ddp.overlap_param_gather=true",
            "ddp.bucket_size=1000",  # or all weights are in one, which the first module waits for
        ],
        2,
    ),
    "tp2 ep2": (
        [
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "model.expert_model_parallel_size=2",
        ],
        2,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small indexed dataset of bytes."""
    folder = tmp_path_factory.mktemp("data")
    texts = [path.read_text() for path in sorted(TEXT.glob("*.md"))]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    command = ["data", "preprocess", "--input", folder / "text.jsonl", "--byte-level"]
    run = [sys.executable, "-m", "gptoss_convert", *map(str, command)]
    subprocess.run([*run, "--output-prefix", str(folder / "text")], check=True, capture_output=True)
    return folder / "text"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' model of the tiny size, with weights that make every part count."""
    from transformers import GptOssConfig, GptOssForCausalLM

    from gptoss_plugins.train.architecture import hf_config
    from gptoss_plugins.train.config import ModelConfig

    config = {k: v for k, v in hf_config(ModelConfig(size="tiny")).items() if k != "architectures"}
    model = GptOssForCausalLM(GptOssConfig(**config)).float()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = 0.1 * torch.randn(weight.shape, generator=noise)
            weight.copy_(values + 1 if "norm" in name else values)
    folder = tmp_path_factory.mktemp("start") / "hf"
    model.save_pretrained(folder)
    return folder


def words(data: Path, *more: str) -> list[str]:
    cache = data.parent / "cache"
    return [
        *("train", "--recipe", "tiny_pretrain_config", "--device", "cpu", "--json"),
        *(f"dataset.blend=[{data}]", f"dataset.path_to_cache={cache}", "logger.log_interval=1"),
        *(f"train.train_iters={STEPS}", "scheduler.lr_warmup_iters=3", "train.eval_iters=0"),
        "logger.tensorboard_dir=null",
        *more,
    ]


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["lines"]
    return [line for line in found if "loss" in line]


def losses_of(done: subprocess.CompletedProcess[str]) -> list[float]:
    return [line["loss"] for line in lines_of(done)]


def launched(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launch, "-m", "gptoss_convert", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def alone(data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, undisturbed: its lines and its checkpoints."""
    save = tmp_path_factory.mktemp("alone") / "run"
    ends = [f"checkpoint.pretrained_checkpoint={start}", f"checkpoint.save={save}"]
    command = words(data, *ends, "checkpoint.load=null", "checkpoint.save_interval=8")
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_convert", *command],
        check=False,
        capture_output=True,
        text=True,
    )
    return {"lines": lines_of(done), "save": save}


def test_losses_are_those_of_transformers(data: Path, start: Path, alone: dict[str, Any]) -> None:
    """A plain loop over transformers' model with torch's AdamW: same start, data and rates."""
    from transformers import GptOssForCausalLM

    from gptoss_plugins.train.recipes import tiny_pretrain_config
    from gptoss_plugins.train.run.data import Place, Steps
    from gptoss_plugins.train.run.text import Tokens, text_datasets

    config = tiny_pretrain_config().having(
        dataset={"blend": ((str(data),), None), "path_to_cache": str(data.parent / "cache")},
        train={"train_iters": STEPS, "eval_iters": 0},
    )
    samples, _ = text_datasets(config, Tokens("bytes", 272, 256, 257))
    model = GptOssForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    named = dict(model.named_parameters())
    bare = [p for n, p in named.items() if n.endswith("bias") or "norm" in n or "sinks" in n]
    kept = [p for p in named.values() if all(p is not other for other in bare)]
    groups = [{"params": kept, "weight_decay": 0.033}, {"params": bare, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps = Steps(samples, config, Place(0, 1, 0, 1, torch.device("cpu")), 272).since(0)
    for line, batches in zip(alone["lines"], steps, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            logits = model(batch.tokens).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, batch.labels.flatten()))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1e9)
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert alone["lines"][-1]["loss"] < alone["lines"][0]["loss"] - 0.5


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.slow) for n in LAYOUTS]
)
def test_every_layout(name: str, data: Path, start: Path, alone: dict[str, Any]) -> None:
    layout, ranks = LAYOUTS[name]
    ends = [f"checkpoint.pretrained_checkpoint={start}", "checkpoint.save=null"]
    done = launched(ranks, *words(data, *ends, "checkpoint.load=null", *layout))
    for ours, line in zip(lines_of(done), alone["lines"], strict=True):
        assert ours["loss"] == pytest.approx(line["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def again(alone: dict[str, Any], place: Path) -> Path:
    """The run, as if it had been killed after its second checkpoint."""
    shutil.copytree(alone["save"], place)
    shutil.rmtree(place / f"iter_{STEPS:07}")
    (place / "latest_checkpointed_iteration.txt").write_text("16\n")
    return place


def test_resumed_runs_are_undisturbed(
    data: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    place = again(alone, tmp_path / "run")
    done = invoke(*words(data, f"checkpoint.save={place}", f"checkpoint.load={place}"))
    assert losses_of(done) == [line["loss"] for line in alone["lines"][16:]]


@pytest.mark.slow
@pytest.mark.parametrize(  # another optimizer does not take up the state of this one
    "name", [n for n, (more, _) in LAYOUTS.items() if not any("use_distributed" in m for m in more)]
)
def test_resumed_at_another_layout(
    name: str, data: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    place, (layout, ranks) = again(alone, tmp_path / "run"), LAYOUTS[name]
    ends = [f"checkpoint.save={place}", f"checkpoint.load={place}"]
    losses = losses_of(launched(ranks, *words(data, *ends, *layout)))
    assert losses == pytest.approx([line["loss"] for line in alone["lines"][16:]], abs=1e-4)


def test_what_was_trained_goes_anywhere(alone: dict[str, Any], tmp_path: Path, invoke: Run) -> None:
    """export gives transformers a model with the same logits; verify passes; generate talks."""
    assert (
        invoke("export", "--megatron-path", alone["save"], "--hf-path", tmp_path / "hf").returncode
        == 0
    )
    done = invoke("verify", tmp_path / "hf", alone["save"], "--logits", "--prompt-length", 150)
    assert done.returncode == 0, done.stdout + done.stderr
    said = invoke("generate", "--megatron-path", alone["save"], "--prompt", "The ", "--json")
    assert said.returncode == 0, said.stderr
    (row,) = json.loads(said.stdout)["results"]
    assert row["prompt_ids"] == list(b"The ")
    assert len(row["ids"]) == 20


def test_sigterm_saves(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    more = ["train.train_iters=10000", f"checkpoint.save={save}", f"checkpoint.load={save}"]
    command = words(data, *more, f"logger.log_file={tmp_path / 'lines'}")
    running = subprocess.Popen(
        [sys.executable, "-m", "gptoss_convert", *command], stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "lines").exists():
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    found = json.loads(out[out.index("{") :])
    assert found["finished"] is False
    tracker = (save / "latest_checkpointed_iteration.txt").read_text()
    assert int(tracker) == found["steps"] > 0


def test_only_the_newest_are_kept(data: Path, tmp_path: Path, invoke: Run) -> None:
    ends = [f"checkpoint.save={tmp_path / 'run'}", "checkpoint.load=null"]
    more = ["train.train_iters=4", "scheduler.lr_warmup_iters=1", "checkpoint.save_interval=1"]
    done = invoke(*words(data, *ends, *more, "checkpoint.most_recent_k=2"))
    assert done.returncode == 0, done.stderr
    kept = sorted(p.name for p in (tmp_path / "run").glob("iter_*"))
    assert kept == ["iter_0000003", "iter_0000004"]


def test_a_failed_save_leaves_the_last_good_one(
    data: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run, tree: Any
) -> None:
    from gptoss_plugins.train.run import saving

    place = again(alone, tmp_path / "run")
    before = tree(place)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_note", fail)
        done = invoke(*words(data, f"checkpoint.save={place}", f"checkpoint.load={place}"))
    assert done.returncode == 4
    assert "the disk is full" in done.stderr
    after = {name: digest for name, digest in tree(place).items() if not name.startswith(".")}
    assert after == before


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run(
    data: Path, alone: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    """The other one ends soon, with one sentence; the last checkpoint is whole, and the run goes on."""
    place = tmp_path / "run"
    ends = [f"checkpoint.save={place}", f"checkpoint.load={place}", "checkpoint.save_interval=2"]
    command = words(data, f"checkpoint.pretrained_checkpoint={start}", *ends)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "gptoss_convert"]
    run = subprocess.Popen(
        [sys.executable, *launch, *command, *LAYOUTS["tp2"][0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (place / "iter_0000004").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    killed = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    _, stderr = run.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert run.returncode != 0
    (told,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "rank 1 is gone" in told
    losses = losses_of(launched(2, *command, *LAYOUTS["tp2"][0]))
    assert 0 < len(losses) <= STEPS - 4
    wanted = [line["loss"] for line in alone["lines"]][-len(losses) :]
    assert losses == pytest.approx(wanted, abs=1e-4)


BF16 = ["mixed_precision=bf16_mixed", "optimizer.use_distributed_optimizer=true"]
SHORT = ["train.train_iters=6", "checkpoint.save_interval=3", "dataset.num_workers=2"]


@pytest.mark.slow
def test_the_published_precision_resumes_anywhere(data: Path, tmp_path: Path, invoke: Run) -> None:
    """bfloat16, float32 master weights in two halves, state and gradients in parts, overlapped; from
    two data-parallel ranks to one, to the digit, and to two tensor-parallel ones.
    """
    place = tmp_path / "run"
    ends = [f"checkpoint.save={place}", f"checkpoint.load={place}"]
    overlap = ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"]
    everything = losses_of(launched(2, *words(data, *ends, *BF16, *SHORT, *overlap)))
    shutil.rmtree(place / "iter_0000006")
    (place / "latest_checkpointed_iteration.txt").write_text("3\n")
    other = shutil.copytree(place, tmp_path / "other")
    resumed = losses_of(invoke(*words(data, *ends, *BF16, *SHORT)))
    assert resumed == pytest.approx(everything[3:], abs=2e-4)
    layout, ranks = LAYOUTS["tp2"]
    ends = [f"checkpoint.save={other}", f"checkpoint.load={other}"]
    resumed = losses_of(launched(ranks, *words(data, *ends, *BF16, *SHORT, *layout)))
    assert resumed == pytest.approx(everything[3:], abs=1e-3)  # products in other orders


@pytest.mark.slow
def test_clipping_is_the_same_with_state_in_parts(data: Path, tmp_path: Path, invoke: Run) -> None:
    none = ["checkpoint.save=null", "checkpoint.load=null", "optimizer.clip_grad=0.4", *SHORT]
    plain, parts = (
        lines_of(invoke(*words(data, *none, f"optimizer.use_distributed_optimizer={said}")))
        for said in ("false", "true")
    )
    assert all(line["grad_norm"] > 0.4 for line in plain)
    for one, other in zip(plain, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_figures_are_told(
    data: Path, tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To TensorBoard, and to W&B, offline; what they are told is what the result has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    told = [
        f"logger.tensorboard_dir={tmp_path / 'curves'}",
        "logger.wandb_project=tiny",
        f"logger.wandb_save_dir={tmp_path}",
        *("checkpoint.save=null", "checkpoint.load=null", "train.eval_interval=2"),
    ]
    done = invoke(*words(data, *told, *SHORT[::2], "train.train_iters=4", "train.eval_iters=1"))
    lines = lines_of(done)
    curves = accumulator.EventAccumulator(str(tmp_path / "curves")).Reload()
    losses = [(one.step, one.value) for one in curves.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert [one.step for one in curves.Scalars("validation_loss")] == [2, 4]
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0
    assert wandb.run is None
    for line in lines:
        assert line["tflops"] > 0
        assert line["mfu"] is None  # nobody says what this CPU can do
        assert 1e8 < line["peak_bytes"] < 1e11  # of a process with torch in it
        assert 0 <= line["expert_load_min"] <= 1 <= line["expert_load_max"] <= 2


def test_a_run_ends_where_it_is_told_to(data: Path, tmp_path: Path, invoke: Run) -> None:
    save = tmp_path / "run"
    ends = [f"checkpoint.save={save}", f"checkpoint.load={save}", "checkpoint.save_interval=100"]
    more = ["train.exit_interval=3", "train.manual_gc=true", "train.manual_gc_interval=2"]
    found = json.loads(invoke(*words(data, *ends, *more)).stdout)
    assert (found["steps"], found["finished"]) == (3, False)
    assert (save / "iter_0000003").is_dir()
    found = json.loads(invoke(*words(data, *ends, *more)).stdout)
    assert (found["steps"], found["finished"]) == (6, False)


def test_dclm_is_where_the_environment_says(
    data: Path, tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{data}{suffix}", tmp_path / f"dclm_{number:02}_text_document{suffix}")
    monkeypatch.setenv("DCLM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DCLM_CACHE", str(tmp_path / "cache"))
    given = [word for word in words(data, *SHORT) if not word.startswith("dataset.")]
    none = ["checkpoint.save=null", "checkpoint.load=null", "dataset.num_workers=0"]
    assert len(losses_of(invoke(*given, *none))) == 6
    assert any((tmp_path / "cache").rglob("*.npy"))
    monkeypatch.setenv("DCLM_DATA_DIR", str(tmp_path / "cache"))
    done = invoke(*given, *none)
    assert done.returncode == 1
    assert "DCLM_DATA_DIR" in done.stderr


@pytest.mark.slow
def test_short_forms(data: Path, invoke: Run) -> None:
    none = ["checkpoint.save=null", "checkpoint.load=null", *SHORT]
    rest = words(data, *none)[3:]
    assert len(losses_of(invoke("pretrain", "--recipe", "tiny", *rest))) == 6
    done = invoke("sft", "--recipe", "tiny_pretrain_config", *rest)
    assert done.returncode == 2
    assert "say pretrain in place of sft" in done.stderr


REFUSED = {
    "tokens of another tokenizer": (
        [
            "model.vocab_size=201",
            "tokenizer.tokenizer_type=NullTokenizer",
            "tokenizer.vocab_size=200",
        ],
        "the data has token",
    ),
    "a tokenizer of more tokens": (["model.vocab_size=201"], "has 272 tokens, and the model 201"),
    "too long": (
        ["model.max_position_embeddings=64"],
        "model.seq_length 128 is longer than the 64 tokens",
    ),
    "no W&B": (["logger.wandb_project=tiny"], "needs wandb"),
    "no data": (["dataset.blend=[/nowhere/text]"], "/nowhere/text.bin"),
    "a typo": (["train.train_iter=3"], "train_iters"),
    "no layout": (["model.tensor_model_parallel_size=3"], "3"),
    "another model": (
        ["checkpoint.pretrained_checkpoint={start}", "model.num_layers=3"],
        "num_layers",
    ),
    "no checkpoint": (["checkpoint.pretrained_checkpoint=/nowhere/hf"], "/nowhere/hf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(
    case: str,
    data: Path,
    start: Path,
    tmp_path: Path,
    invoke: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more, sentence = REFUSED[case]
    if case == "no W&B":
        from gptoss_plugins.train import telling

        monkeypatch.setattr(telling, "find_spec", lambda _: None)
    ends = [f"checkpoint.save={tmp_path / 'run'}", "checkpoint.load=null"]
    done = invoke(*words(data, *ends, *(word.format(start=start) for word in more)))
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("*"))


NOT_RESUMED = {
    "another model": (["model.moe_router_topk=3"], "moe_router_topk differ"),
    "state in parts": (["optimizer.use_distributed_optimizer=true"], "without the distributed"),
    "another precision": (["mixed_precision=bf16_mixed"], "the optimizer's state of fp32"),
    "another optimizer": (["optimizer.optimizer=sgd"], "the optimizer's state of adam"),
}


@pytest.mark.parametrize("case", NOT_RESUMED)
def test_what_cannot_go_on_says_so(
    case: str, data: Path, alone: dict[str, Any], invoke: Run
) -> None:
    more, sentence = NOT_RESUMED[case]
    done = invoke(*words(data, f"checkpoint.load={alone['save']}", "checkpoint.save=null", *more))
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_goes_on_from_what_reshard_wrote(
    data: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """With the optimizer's state, and what says how far it came."""
    target = tmp_path / "resharded"
    done = invoke("reshard", "--megatron-path", alone["save"], "--output", target, "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert "written and the optimizer's state carried in" in done.stdout
    more = [f"train.train_iters={STEPS + 1}", "checkpoint.save=null", "--json"]
    found = [invoke(*words(data, f"checkpoint.load={p}", *more)) for p in (alone["save"], target)]
    own, other = (json.loads(one.stdout)["lines"] for one in found)
    assert own[0]["step"] == other[0]["step"] == STEPS
    (loss,) = (line["loss"] for line in own if "loss" in line)
    assert [line["loss"] for line in other if "loss" in line] == [loss]


def test_a_file_that_was_cut_is_named(
    data: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    place = again(alone, tmp_path / "run")
    cut = max(place.glob("iter_*/*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(cut, cut.stat().st_size // 2)
    done = invoke(*words(data, f"checkpoint.load={place}", "checkpoint.save=null"))
    assert done.returncode == 1
    assert f"{cut.name}: is cut short" in done.stderr


def test_a_full_disk_is_one_sentence(data: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """Files may have 300 kB: torch's writer fails, whose exception is no Exception."""
    place = again(alone, tmp_path / "run")
    run = [sys.executable, "-m", "gptoss_convert", *words(data, f"checkpoint.save={place}")]
    command = ["bash", "-c", "ulimit -f 300; trap '' XFSZ; exec \"$@\"", "bash", *run]
    more = [f"checkpoint.load={place}", "checkpoint.save_interval=2"]
    done = subprocess.run([*command, *more], check=False, capture_output=True, text=True)
    assert done.returncode in (1, 4)
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not list(place.glob(".iter_*"))
    assert (place / "latest_checkpointed_iteration.txt").read_text() == "16\n"
    assert sorted(p.name for p in place.glob("iter_*")) == ["iter_0000008", "iter_0000016"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "pp2", "ep2"])
def test_random_weights_are_those_of_any_layout(name: str, data: Path, invoke: Run) -> None:
    none = ["checkpoint.save=null", "checkpoint.load=null", *SHORT]
    layout, ranks = LAYOUTS[name]
    everywhere = losses_of(launched(ranks, *words(data, *none, *layout)))
    assert everywhere == pytest.approx(losses_of(invoke(*words(data, *none))), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["full", "model.recompute_method=uniform", "model.recompute_num_layers=1"],
        ["selective", "model.recompute_modules=[moe_act,core_attn]"],
    ],
)
def test_recomputed_is_the_same(how: list[str], data: Path, invoke: Run) -> None:
    none = ["checkpoint.save=null", "checkpoint.load=null", *SHORT, "dataset.num_workers=0"]
    kept = lines_of(invoke(*words(data, *none)))
    again_ = lines_of(
        invoke(*words(data, *none, f"model.recompute_granularity={how[0]}", *how[1:]))
    )
    for one, other in zip(kept, again_, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
