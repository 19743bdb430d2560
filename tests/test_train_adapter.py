"""Training adapters: PEFT's own losses, in every layout, resumed; and what comes of it goes everywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXT = Path(__file__).parents[1] / "docs"  # any text will do
STEPS = 8
EACH, SHARED = "peft.share_expert_adapters=false", "peft.share_expert_adapters=true"
# overrides of runs on two ranks
LAYOUTS = {
    "tp2": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pp2": ["model.pipeline_model_parallel_size=2"],
    "ep2": ["model.expert_model_parallel_size=2"],
    "dp2": ["optimizer.use_distributed_optimizer=true"],
    "cp2": ["model.context_parallel_size=2"],
    "tp2 ep2": [
        *("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        "model.expert_model_parallel_size=2",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small indexed dataset of bytes."""
    folder = tmp_path_factory.mktemp("data")
    texts = [path.read_text()[:9000] for path in sorted(TEXT.glob("*.md"))]
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


def words(data: Path, start: Path, *more: str) -> list[str]:
    cache = data.parent / "cache"
    return [
        *("train", "--recipe", "tiny_pretrain_config", "--device", "cpu", "--json"),
        *("peft=lora", "peft.dim=3", "peft.alpha=5", "optimizer.lr=0.01"),
        *(f"dataset.blend=[{data}]", f"dataset.path_to_cache={cache}", "logger.log_interval=1"),
        *(f"train.train_iters={STEPS}", "scheduler.lr_warmup_iters=2", "train.eval_iters=0"),
        *("train.global_batch_size=8", "train.micro_batch_size=4"),
        *(f"checkpoint.pretrained_checkpoint={start}", *more),
    ]


def lines_of(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["lines"]
    return [line for line in found if "loss" in line]


def launched(ranks: int, *arguments: str) -> Any:
    alone = [sys.executable, "-m"]
    several = [*alone, "torch.distributed.run", f"--nproc_per_node={ranks}", "-m"]
    return subprocess.run(
        [*(several if ranks > 1 else alone), "gptoss_convert", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def alone(data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one process: their lines and their checkpoints, by what they adapt."""
    found = {}
    for kind in (EACH, SHARED):
        save = tmp_path_factory.mktemp("alone") / "run"
        more = [f"checkpoint.save={save}", "checkpoint.load=null", "checkpoint.save_interval=4"]
        lines = lines_of(launched(1, *words(data, start, *more, kind)))
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
        found[kind] = {"lines": lines, "save": save}
    return found


@pytest.mark.slow
def test_losses_are_those_of_peft(data: Path, start: Path, alone: dict[str, Any]) -> None:
    """A plain loop over transformers' model with PEFT's adapters: the same draw, data and rates.

    Without q, k and v, whose adapters share A here, and not in PEFT.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssForCausalLM

    from gptoss_plugins.adapter.modules import drawn
    from gptoss_plugins.train.recipes import tiny_pretrain_config
    from gptoss_plugins.train.run.data import Place, Steps
    from gptoss_plugins.train.run.text import Tokens, text_datasets

    targets = "peft.target_modules=[linear_proj,linear_fc1,linear_fc2]"
    save = ["checkpoint.save=null", "checkpoint.load=null"]
    lines = lines_of(launched(1, *words(data, start, *save, EACH, targets)))
    config = tiny_pretrain_config().having(
        dataset={"blend": ((str(data),), None), "path_to_cache": str(data.parent / "cache")},
        train={
            "train_iters": STEPS,
            "eval_iters": 0,
            "global_batch_size": 8,
            "micro_batch_size": 4,
        },
    )
    samples, _ = text_datasets(config, Tokens("bytes", 272, 256, 257))
    base = GptOssForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=experts)
    model = get_peft_model(base, lora).train()
    count = base.config.num_local_experts
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" not in name:
                continue
            layer = int(name.split(".layers.")[1].split(".")[0]) + 1
            inputs = weight.shape[1]
            if "o_proj" in name:
                weight.copy_(drawn(f"{layer} linear_proj", 3, inputs, 1234))
            else:
                linear = "linear_fc1" if "base_layer" in name else "linear_fc2"
                each = [drawn(f"{layer} {linear} {n}", 3, inputs, 1234) for n in range(count)]
                weight.copy_(torch.cat(each))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.033)
    steps = Steps(samples, config, Place(0, 1, 0, 1, torch.device("cpu")), 272).since(0)
    for line, batches in zip(lines, steps, strict=False):
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            made = model(batch.tokens).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(made, batch.labels.flatten()))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1e9)
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EACH, SHARED])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, kind: str, data: Path, start: Path, alone: dict[str, Any]) -> None:
    ends = ["checkpoint.save=null", "checkpoint.load=null", kind, *LAYOUTS[name]]
    found = lines_of(launched(2, *words(data, start, *ends)))
    for ours, line in zip(found, alone[kind]["lines"], strict=True):
        assert ours["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def again(alone: dict[str, Any], place: Path) -> Path:
    """The run, as if it had been killed after its first checkpoint."""
    shutil.copytree(alone["save"], place)
    shutil.rmtree(place / f"iter_{STEPS:07}")
    (place / "latest_checkpointed_iteration.txt").write_text("4\n")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EACH, SHARED])
def test_resumed_runs_are_undisturbed(
    kind: str, data: Path, start: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    place = again(alone[kind], tmp_path / "run")
    ends = [f"checkpoint.save={place}", f"checkpoint.load={place}", kind]
    losses = [line["loss"] for line in lines_of(invoke(*words(data, start, *ends)))]
    assert losses == [line["loss"] for line in alone[kind]["lines"][4:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EACH, SHARED])
@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_at_another_layout(
    name: str, kind: str, data: Path, start: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    """And what it saves there is, to rounding, what one process saves."""
    if name == "dp2":
        pytest.skip("moments of another optimizer")
    place = again(alone[kind], tmp_path / "run")
    ends = [f"checkpoint.save={place}", f"checkpoint.load={place}", kind, *LAYOUTS[name]]
    losses = [line["loss"] for line in lines_of(launched(2, *words(data, start, *ends)))]
    assert losses == pytest.approx([line["loss"] for line in alone[kind]["lines"][4:]], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EACH, SHARED])
def test_what_was_trained_goes_anywhere(
    kind: str, start: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """The checkpoint has adapters only; PEFT loads the export with the logits of the merged model, and
    those are the logits of the running one, which its last loss tells.
    """
    from peft import PeftModel
    from transformers import GptOssForCausalLM

    run = alone[kind]["save"]
    from gptoss_plugins.megatron.source import TorchDistSource

    assert all(".adapter." in name for name in TorchDistSource(run).specs())
    done = invoke("adapter", "export", "--adapter", run, "--output", tmp_path / "peft", "--json")
    assert done.returncode == 0, done.stderr
    shared = [t["shared"] for t in json.loads(done.stdout)["adapter"]["targets"] if t["experts"]]
    assert shared == [kind == SHARED] * 2
    words = ("--adapter", run, "--hf-model", start, "--hf-path", tmp_path / "merged")
    assert invoke("adapter", "merge", *words).returncode == 0
    load = GptOssForCausalLM.from_pretrained
    peft = PeftModel.from_pretrained(load(start, dtype=torch.float32), str(tmp_path / "peft"))
    merged, plain = (load(p, dtype=torch.float32).eval() for p in (tmp_path / "merged", start))
    ids = torch.arange(2, 140)[None]
    with torch.no_grad():
        ours, theirs, base = (m(ids).logits for m in (merged, peft.eval(), plain))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - base).abs().max() > 0.05


def test_only_adapters_are_trained(data: Path, start: Path) -> None:
    """The base keeps every bit; gradients and moments there are of adapters alone; with dropout, too. What
    is embedded has a gradient, without which nothing behind it could be recomputed.
    """
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.choosing import chosen
    from gptoss_plugins.train.ranks import layout_of
    from gptoss_plugins.train.run.data import Steps, place_of
    from gptoss_plugins.train.run.datasets import datasets_of
    from gptoss_plugins.train.run.loop import _begin
    from gptoss_plugins.train.run.step import train_step

    registry = default_registry()
    more = ["checkpoint.save=null", "checkpoint.load=null", "peft.dropout=0.2", EACH]
    said = words(data, start, *more)
    config = chosen(registry.recipes(), "tiny_pretrain_config", None, said[6:])
    with world_of(layout_of(config.model), "cpu") as place:
        train, _, _ = datasets_of(config, registry)
        trainee, _ = _begin(config, registry, place)
        (model,) = trainee.live.models
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        steps = Steps(train, config, place_of(place), 272).since(0)
        for batches in (next(steps), next(steps), next(steps)):
            train_step(trainee, batches)
        assert model.embedding(batches[0].tokens, batches[0].positions).requires_grad
        trained = {id(p) for group in trainee.optimizer.param_groups for p in group["params"]}
        for name, weight in model.named_parameters():
            is_adapter = ".adapter." in name
            assert torch.equal(before[name], weight) is not is_adapter, name
            assert weight.requires_grad is (id(weight) in trained) is is_adapter, name
            assert hasattr(weight, "main_grad") is is_adapter, name
    assert sum(".adapter." in name for name in before) == 4 * 4 * 2


@pytest.mark.slow
def test_generate_and_chat_with_an_adapter(
    data: Path, start: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    """The base with an adapter says what the merged model says, and not what the base does."""
    run = alone[EACH]["save"]
    words = ("--adapter", run, "--hf-model", start, "--hf-path", tmp_path / "merged")
    assert invoke("adapter", "merge", *words).returncode == 0
    tokens = ("--tokenizer", run / f"iter_{STEPS:07}/tokenizer", "--torch-dtype", "float32")
    found = {}
    # The last prompt is long enough for tensor-parallel ranks to share its tokens.
    texts = ["The ", "## ", "No two alike. " * 20]
    prompts = [part for text in texts for part in ("--prompt", text)]
    for name, ranks, model in (
        ("base", 1, ("--hf-model", start)),
        ("adapter", 1, ("--hf-model", start, "--adapter", run)),
        ("adapter, tp2", 2, ("--hf-model", start, "--adapter", run, "--tp", 2)),
        ("merged", 1, ("--hf-model", tmp_path / "merged")),
    ):
        asked = ("generate", *model, *prompts, "--max-new-tokens", 30, "--json", *tokens)
        done = invoke(*asked) if ranks == 1 else launched(ranks, *map(str, asked))
        assert done.returncode == 0, done.stderr
        found[name] = [row["ids"] for row in json.loads(done.stdout)["results"]]
    assert found["adapter"] == found["adapter, tp2"] == found["merged"] != found["base"]
    done = invoke("generate", "--megatron-path", run, "--prompt", "x")
    assert "is the checkpoint of an adapter" in done.stderr


@pytest.mark.slow
def test_begun_anew_from_adapters(
    data: Path, start: Path, alone: dict[str, Any], invoke: Run
) -> None:
    """checkpoint.finetune takes the adapters and begins at step 0."""
    run = alone[EACH]
    more = [f"checkpoint.load={run['save']}", "checkpoint.finetune=true", "checkpoint.save=null"]
    (line,) = lines_of(
        invoke(
            *words(data, start, *more, EACH, "train.train_iters=1", "scheduler.lr_warmup_iters=0")
        )
    )
    assert line["step"] == 1
    assert line["loss"] < run["lines"][0]["loss"] - 0.1


REFUSED = {
    "no base": (["checkpoint.pretrained_checkpoint=null"], "pretrained_checkpoint is null"),
    "another rank": (["peft.dim=2", "checkpoint.load={run}"], "(4, 192, 3)"),
    "another kind": ([SHARED, "checkpoint.load={run}"], "experts"),
    "a model's run": (["checkpoint.load={run}", "peft=null"], "is the checkpoint of an adapter"),
    "fewer targets": (["peft.target_modules=[linear_qkv]", "checkpoint.load={run}"], "linear_proj"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(
    case: str, data: Path, start: Path, alone: dict[str, Any], tmp_path: Path, invoke: Run
) -> None:
    more, sentence = REFUSED[case]
    run = alone[EACH]["save"]
    ends = ["checkpoint.save=null", "checkpoint.load=null", EACH]
    done = invoke(*words(data, start, *ends, *(word.format(run=run) for word in more)))
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
