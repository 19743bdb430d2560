"""Fine-tuning: packed rows give the losses and gradients of the samples alone, which are transformers'."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

LENGTH = 160  # of a row; the samples are longer than the window, 16
SIZES = [(30, 21), (9, 70), (41, 33), (25, 8), (60, 61), (12, 17), (33, 29)]  # letters, answered


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``training.jsonl`` of a few samples, no two alike."""
    letters = random.Random(3)
    made = tmp_path_factory.mktemp("sft")

    def text(size: int) -> str:
        return "".join(letters.choices("abcdefghijklmnopqrstuvwxyz ,.", k=size))

    rows = [{"prompt": text(asked), "completion": text(said)} for asked, said in SIZES]
    (made / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def config_of(folder: Path, *, packing: bool, rows: int, **model: Any) -> Any:
    from gptoss_plugins.train.recipes import tiny_sft_config

    return tiny_sft_config().having(
        dataset={
            "dataset_root": str(folder),
            "packing": packing,
            "sequence_length": LENGTH,
            "val_proportion": 0.0,
        },
        model={"seq_length": LENGTH, **model},
        train={"global_batch_size": rows, "micro_batch_size": 1},
    )


@pytest.fixture
def learned() -> Callable[..., Any]:
    """A step's loss and gradients, without taking it; and the model and batches it was made of."""
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.ranks import layout_of
    from gptoss_plugins.train.run.data import Steps, place_of
    from gptoss_plugins.train.run.datasets import datasets_of
    from gptoss_plugins.train.run.step import _run
    from gptoss_plugins.train.run.trainee import build_trainee

    registry = default_registry()

    def learn(config: Any) -> Any:
        with world_of(layout_of(config.model), "cpu") as place:
            rows, _, _ = datasets_of(config, registry)
            trainee = build_trainee(config, registry, place, random_weights=True)
            fill(trainee)
            batches = next(Steps(rows, config, place_of(place), 272).since(0))
            for chunk in trainee.chunks:
                chunk.train()
            loss = _run(trainee, batches, forward_only=False)
            grads = {n: p.main_grad.clone() for n, p in trainee.live.models[0].named_parameters()}
            return float(loss), grads, batches

    return learn


@torch.no_grad()
def fill(trainee: Any) -> None:
    """Weights that make every part count."""
    noise = torch.Generator().manual_seed(5)
    for name, weight in trainee.live.models[0].named_parameters():
        values = 0.1 * torch.randn(weight.shape, generator=noise)
        weight.copy_(values + 1 if "norm" in name else values)


def packs(folder: Path) -> int:
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.data.sft import sft_datasets
    from gptoss_plugins.train.run.tokens import tokenizer_of

    config = config_of(folder, packing=True, rows=1)
    with tokenizer_of(config, default_registry()) as (tokenizer, _):
        return len(sft_datasets(config.dataset, tokenizer)[0])


@pytest.mark.parametrize("fused", [True, False])
def test_packed_is_unpacked(folder: Path, learned: Any, fused: bool) -> None:
    rows = packs(folder)
    assert 1 < rows < len(SIZES)
    how = {"cross_entropy_loss_fusion": fused}
    packed_loss, packed, _ = learned(config_of(folder, packing=True, rows=rows, **how))
    loss, alone, _ = learned(config_of(folder, packing=False, rows=len(SIZES), **how))
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in alone.items():
        error = (packed[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, name


def test_a_step_is_the_answers_of_transformers_alone(folder: Path, learned: Any) -> None:
    """The loss is the mean over all answers' tokens, by transformers' model on each sample by itself."""
    from transformers import GptOssConfig, GptOssForCausalLM

    from gptoss_plugins.train.architecture import hf_config

    config = config_of(folder, packing=True, rows=packs(folder))
    loss, _, batches = learned(config)
    theirs = hf_model(config, GptOssConfig, GptOssForCausalLM, hf_config(config.model))
    total, count = 0.0, 0
    for batch in batches:
        for start in batch.starts.unique():
            own = batch.starts[0] == start
            logits = theirs(batch.tokens[:, own]).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits, batch.labels[0, own], reduction="none"
            )
            total += float((losses * batch.mask[0, own]).sum())
            count += int(batch.mask[0, own].sum())
    assert count == sum(said + 1 for _, said in SIZES)  # and the end of each
    assert loss == pytest.approx(total / count, abs=1e-5)


def hf_model(config: Any, kind: Any, model: Any, fields: dict[str, Any]) -> Any:
    """transformers' model with the weights that ``fill`` draws, by the project's own export rules."""
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.ranks import layout_of
    from gptoss_plugins.train.run.trainee import build_trainee

    fields = {key: value for key, value in fields.items() if key != "architectures"}
    theirs = model(kind(**fields)).float().eval()
    with world_of(layout_of(config.model), "cpu") as place:
        trainee = build_trainee(config, default_registry(), place, random_weights=True)
        fill(trainee)
        ours = {n: p.detach() for n, p in trainee.live.models[0].named_parameters()}
    theirs.load_state_dict(in_hf_names(ours, fields))
    return theirs


def in_hf_names(ours: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Written here once more, by hand: gate and up interleaved, groups of [q.., k, v]."""
    heads, groups, size = (
        fields[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    each = heads // groups
    found = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(fields["num_hidden_layers"]):
        mine = {
            name.removeprefix(f"decoder.layers.{layer}."): value
            for name, value in ours.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        at = f"model.layers.{layer}."
        found[f"{at}input_layernorm.weight"] = mine["input_layernorm.weight"]
        found[f"{at}post_attention_layernorm.weight"] = mine["pre_mlp_layernorm.weight"]
        found[f"{at}self_attn.sinks"] = mine["self_attention.core_attention.softmax_offset"]
        for end in ("weight", "bias"):
            rows = mine[f"self_attention.linear_qkv.{end}"].unflatten(0, (groups, each + 2, size))
            for name, part in zip(
                "qkv", (rows[:, :each], rows[:, each : each + 1], rows[:, each + 1 :]), strict=True
            ):
                found[f"{at}self_attn.{name}_proj.{end}"] = part.flatten(0, 2)
            found[f"{at}self_attn.o_proj.{end}"] = mine[f"self_attention.linear_proj.{end}"]
            found[f"{at}mlp.router.{end}"] = mine[f"mlp.router.{end}"]
        for theirs, name in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            weight, bias = (mine[f"mlp.experts.{name}.{end}"] for end in ("weight", "bias"))
            if theirs == "gate_up_proj":
                weight, bias = (
                    torch.stack(part.chunk(2, 1), 2).flatten(1, 2) for part in (weight, bias)
                )
            found[f"{at}mlp.experts.{theirs}"] = weight.transpose(1, 2)
            found[f"{at}mlp.experts.{theirs}_bias"] = bias
    return found
