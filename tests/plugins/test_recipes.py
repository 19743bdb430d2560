"""Recipes: their published values, the models they name, the page that explains them."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.errors import UsageError
from gptoss_convert.registry import default_registry
from gptoss_plugins.train.architecture import hf_config, megatron_fields, parameters
from gptoss_plugins.train.choosing import chosen
from gptoss_plugins.train.config import LoRA, ModelConfig, TrainingConfig
from gptoss_plugins.train.names import ALIASES, section_types
from gptoss_plugins.train.overrides import override
from gptoss_plugins.train.plain import to_plain
from gptoss_plugins.train.reading import describe, hints_of
from gptoss_plugins.train.recipes import (
    ENVIRONMENT,
    RECIPES,
    gpt_oss_20b_finetune_config,
    gpt_oss_20b_peft_config,
    gpt_oss_20b_pretrain_config,
    gpt_oss_20b_sft_config,
    gpt_oss_120b_finetune_config,
    gpt_oss_120b_sft_config,
    tiny_pretrain_config,
    tiny_sft_config,
)

ROOT = Path(__file__).parents[2]
BY_NAME = {make.__name__: make for make in RECIPES}

# --- the published values, written out from Megatron-Bridge's (docs/recipes.md says which) --------

# recipe: TP/PP/EP/CP/SP | sequence | GBS/MBS | iterations | lr -> min | warm-up | beta2 | format |
# save/eval/eval_iters/log/seed
PRETRAIN = "4096 | 512/1 | 1000000 | 3e-4 3e-5 | 2000 | .95 | {} | 500/2000/32/10/1234"
SFT = "{} | {}/1 | 1000 | 5e-6 0 | 50 | .98 | {} | 250/50/32/1/5678"
PEFT = "2048 | 128/1 | 1000 | 1e-4 0 | 50 | .98 | {} | 250/50/32/1/5678"
TABLE = {
    "20b_pretrain": "2/4/4/1/T | " + PRETRAIN.format("bf16"),
    "20b_pretrain_fp8_current_scaling": "2/4/4/1/T | " + PRETRAIN.format("fp8cs"),
    "20b_pretrain_mxfp8": "2/4/4/1/T | " + PRETRAIN.format("mxfp8"),
    "120b_pretrain": "2/4/16/1/T | " + PRETRAIN.format("bf16"),
    "20b_sft": "1/1/8/1/F | " + SFT.format(2048, 128, "bf16"),
    "20b_sft_32k": "1/1/8/1/F | " + SFT.format(32768, 32, "bf16"),
    "20b_sft_fp8_current_scaling": "1/1/8/1/F | " + SFT.format(2048, 128, "fp8cs"),
    "20b_sft_mxfp8": "1/1/8/1/F | " + SFT.format(2048, 128, "mxfp8_no_gather"),
    "20b_sft_openmathinstruct2_thinking_packed": "1/1/8/1/F | " + SFT.format(4096, 128, "bf16"),
    "120b_sft": "1/4/8/1/F | " + SFT.format(2048, 128, "bf16"),
    "120b_sft_32k": "2/6/4/4/T | " + SFT.format(32768, 4, "bf16"),
    "20b_peft": "1/1/1/1/F | " + PEFT.format("bf16"),
    "20b_peft_fp8_current_scaling": "1/1/1/1/F | " + PEFT.format("fp8cs"),
    "20b_peft_mxfp8": "1/1/1/1/F | " + PEFT.format("mxfp8"),
    "120b_peft": "1/1/8/1/F | " + PEFT.format("bf16"),
    "20b_finetune": "1/1/1/1/F | " + PEFT.format("bf16"),
    "120b_finetune": "1/1/8/1/F | " + PEFT.format("bf16"),
}
# bf16, fp8, its scaling, weights gathered in FP8, in the gradients' memory, first and last in bf16
FORMATS: dict[str, tuple[Any, ...]] = {
    "bf16": (True, None, "tensorwise", False, False, False, 0, 0),
    "fp8cs": (True, "hybrid", "tensorwise", True, False, True, 1, 1),
    "mxfp8": (True, "e4m3", "mxfp8", True, True, False, 0, 0),
    "mxfp8_no_gather": (True, "e4m3", "mxfp8", False, False, False, 0, 0),
}


def published(line: str) -> dict[str, Any]:
    """A line of the table -> dotted names and values."""
    layout, sequence, batch, iters, rates, warmup, beta2, form, rest = line.split(" | ")
    tp, pp, ep, cp, sp = layout.split("/")
    gbs, mbs = batch.split("/")
    save, eval_, eval_iters, log, seed = rest.split("/")
    whole = {
        "model.tensor_model_parallel_size": tp,
        "model.pipeline_model_parallel_size": pp,
        "model.expert_model_parallel_size": ep,
        "model.context_parallel_size": cp,
        "model.seq_length": sequence,
        "dataset.sequence_length": sequence,
        "train.global_batch_size": gbs,
        "train.micro_batch_size": mbs,
        "train.train_iters": iters,
        "train.eval_interval": eval_,
        "train.eval_iters": eval_iters,
        "scheduler.lr_warmup_iters": warmup,
        "checkpoint.save_interval": save,
        "logger.log_interval": log,
        "rng.seed": seed,
    }
    lr, min_lr = map(float, rates.split())
    return {
        **{name: int(value) for name, value in whole.items()},
        "model.sequence_parallel": sp == "T",
        "model.moe_router_padding_for_fp8": form != "bf16",
        "optimizer.lr": lr,
        "optimizer.min_lr": min_lr,
        "optimizer.adam_beta2": float(beta2),
        "mixed_precision": FORMATS[form],
        # the same for all
        "model.expert_tensor_parallel_size": 1,
        "model.virtual_pipeline_model_parallel_size": None,
        "model.cp_comm_type": "a2a",
        "optimizer.optimizer": "adam",
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 1.0,
        "optimizer.use_distributed_optimizer": True,
        "scheduler.start_weight_decay": 0.033,
        "scheduler.end_weight_decay": 0.033,
        "scheduler.weight_decay_incr_style": "constant",
        "scheduler.lr_decay_style": "cosine",
        "scheduler.lr_decay_iters": None,
        "scheduler.lr_warmup_init": 0.0,
        "checkpoint.ckpt_format": "torch_dist",
        "checkpoint.fully_parallel_save": True,
        "checkpoint.save": "nemo_experiments/default/checkpoints",
        "checkpoint.load": "nemo_experiments/default/checkpoints",
        "logger.tensorboard_dir": "nemo_experiments/default/tb_logs",
        "ddp.average_in_collective": False,
    }


def value(config: TrainingConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return dataclasses.astuple(config) if dataclasses.is_dataclass(config) else config


def recipe(name: str) -> TrainingConfig:
    return BY_NAME[f"gpt_oss_{name}_config"]()


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = recipe(name)
    assert config.model.size == name.partition("_")[0]
    wanted = published(TABLE[name])
    assert {key: value(config, key) for key in wanted} == wanted


def test_every_recipe_is_in_the_table_or_tiny() -> None:
    assert BY_NAME.keys() == {f"gpt_oss_{n}_config" for n in TABLE} | {
        f"tiny_{kind}_config" for kind in ("pretrain", "sft", "peft")
    }


@pytest.mark.parametrize("name", [n for n in TABLE if "pretrain" in n])
def test_pretraining(name: str) -> None:
    config = recipe(name)
    assert config.dataset.kind == "pretrain"
    assert config.dataset.blend is None
    assert config.dataset.split == "9999,8,2"
    assert (config.tokenizer.tokenizer_type, config.tokenizer.vocab_size) == (
        "NullTokenizer",
        32000,
    )
    assert config.ddp.overlap_grad_reduce
    assert config.ddp.overlap_param_gather
    assert config.ddp.grad_reduce_in_fp32
    assert config.model.calculate_per_token_loss
    assert config.model.recompute_granularity is None
    assert config.peft is None


@pytest.mark.parametrize("name", [n for n in TABLE if "pretrain" not in n])
def test_fine_tuning(name: str) -> None:
    config, math, long = recipe(name), "openmath" in name, name == "120b_sft_32k"
    data = config.dataset
    assert data.kind == "sft"
    assert data.packing
    assert (data.dataset_name, data.form, data.val_proportion, data.pad_seq_to_mult) == (
        ("openmathinstruct2_thinking", "chat", 0.05, 1)
        if math
        else ("squad", "prompt_completion", 0.1, 8 if long else 1)
    )
    assert config.tokenizer.tokenizer_model == f"openai/gpt-oss-{config.model.size}"
    assert not config.ddp.overlap_grad_reduce
    assert not config.ddp.overlap_param_gather
    assert not config.ddp.grad_reduce_in_fp32
    model = config.model
    assert model.calculate_per_token_loss is long
    assert model.cross_entropy_loss_fusion is not long
    assert (model.recompute_granularity, model.recompute_modules) == (
        ("selective", ("moe_act",)) if long else (None, None)
    )
    adapters = LoRA(32, 32.0, 0.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    assert config.peft == (None if "sft" in name else adapters)


def test_environment() -> None:
    assert ENVIRONMENT == {
        "NCCL_GRAPH_REGISTER": "0",
        "NCCL_NVLS_ENABLE": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "TORCH_NCCL_HIGH_PRIORITY": "1",
    }


def test_finetune_is_peft_or_sft() -> None:
    assert gpt_oss_20b_finetune_config() == gpt_oss_20b_peft_config()
    for nothing in (None, "none"):
        assert gpt_oss_20b_finetune_config(peft=nothing) == gpt_oss_20b_sft_config()
    assert gpt_oss_120b_finetune_config(peft=None) == gpt_oss_120b_sft_config()
    eight = LoRA(dim=8)
    assert gpt_oss_20b_finetune_config(peft=eight).peft == eight
    with pytest.raises(UsageError, match="peft takes lora or null, and not 'dora'"):
        gpt_oss_20b_finetune_config(peft="dora")


def test_on_the_command_line_peft_goes_to_the_finetune_recipe() -> None:
    recipes = default_registry().recipes()
    words = ["train.train_iters=60", "peft=null", "optimizer.lr=1e-5"]
    got = chosen(recipes, "20b_finetune", None, words)
    assert got == gpt_oss_20b_sft_config().having(train={"train_iters": 60}, optimizer={"lr": 1e-5})
    # of any other recipe it is a section
    alone = chosen(recipes, "20b_peft", None, ["peft=null"])
    assert alone == dataclasses.replace(gpt_oss_20b_peft_config(), peft=None)


# --- the models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_the_model_is_the_published_one(size: str) -> None:
    """Held against config.json as OpenAI publishes it."""
    config = json.loads((Path(__file__).parent / "published" / f"config_{size}.json").read_text())
    for name in ("quantization_config", "transformers_version"):
        del config[name]
    assert hf_config(ModelConfig(size=size)) == config


@pytest.mark.parametrize(("size", "count"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_number_of_weights(size: str, count: int) -> None:
    assert parameters(ModelConfig(size=size)) == count


def test_sizes_can_be_changed_one_by_one() -> None:
    model = override(
        gpt_oss_20b_pretrain_config(),
        [
            "model.num_layers=6",
            "model.vocab_size=1024",
            "model.moe_router_topk=3",
            "model.moe_router_load_balancing_type=aux_loss",
            "model.moe_aux_loss_coeff=0.01",
        ],
    ).model
    fields = megatron_fields(model)
    assert fields["num_layers"] == 6
    assert fields["vocab_size"] == 1024
    assert fields["moe_router_topk"] == 3
    assert fields["hidden_size"] == 2880
    assert fields["window_attn_skip_freq"] == 2
    assert fields["seq_length"] == 131072  # what the checkpoint says; training takes 4096
    assert fields["moe_router_load_balancing_type"] == "aux_loss"
    assert fields["moe_aux_loss_coeff"] == 0.01


def test_the_tiny_model_makes_a_megatron_config() -> None:
    """``make_config`` takes it; its module is read, as importing it takes megatron-core's seconds."""
    source = (ROOT / "plugins/gptoss_plugins/gpt_model/config.py").read_text()
    (required,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIRED_FIELDS"
    ]
    assert len(required) > 20
    assert set(required) <= megatron_fields(ModelConfig(size="tiny")).keys()
    assert 200_000 < parameters(ModelConfig(size="tiny")) < 300_000


# --- the page -------------------------------------------------------------------------------------


def described_fields(kind: type) -> dict[str, str]:
    """What a config's docstring says of each field."""
    text = (kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(told.replace("``", "`").split()) for name, told in found}


def field_table(kind: type) -> str:
    """A section as docs/recipes.md has it."""
    lines, told = ["| field | takes | default | |", "|---|---|---|---|"], described_fields(kind)
    for field in dataclasses.fields(kind):
        takes = describe(hints_of(kind)[field.name])
        default = json.dumps(to_plain(field.default))
        lines.append(f"| `{field.name}` | {takes} | `{default}` | {told[field.name]} |")
    return "\n".join(lines)


KINDS = [(name, kind) for name, kinds in section_types().items() for kind in kinds]


@pytest.mark.parametrize(("section", "kind"), KINDS)
def test_the_page_explains_every_field(section: str, kind: type) -> None:
    assert described_fields(kind).keys() == hints_of(kind).keys()
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert field_table(kind) in page, (
        f"{section}: put this into docs/recipes.md\n{field_table(kind)}"
    )


def test_the_page_names_every_recipe_and_alias() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in [*BY_NAME, *ALIASES, *ALIASES.values()]:
        assert f"`{name}`" in page


def test_tiny_recipes_run_on_a_cpu() -> None:
    """megatron-core's clipping, distributed optimizer and bf16 ask for CUDA tensors."""
    for config in (tiny_pretrain_config(), tiny_sft_config()):
        assert not config.mixed_precision.bf16
        assert not config.optimizer.use_distributed_optimizer
        assert config.optimizer.clip_grad == 0
