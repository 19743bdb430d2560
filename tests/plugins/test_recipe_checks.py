"""What of a recipe does not go together: every problem told, and every remedy tried."""

from __future__ import annotations

import importlib.util

import pytest

from gptoss_plugins.train.checks import RecipeError, check, require_sound
from gptoss_plugins.train.config import TrainingConfig
from gptoss_plugins.train.overrides import override
from gptoss_plugins.train.ranks import data_parallel, microbatches, smallest_world
from gptoss_plugins.train.recipes import (
    RECIPES,
    gpt_oss_20b_pretrain_config,
    gpt_oss_20b_sft_config,
)

BY_NAME = {make.__name__: make for make in RECIPES}

# --- what does not go together --------------------------------------------------------------------


def needs_transformer_engine(name: str) -> bool:
    return "fp8" in name and importlib.util.find_spec("transformer_engine") is None


@pytest.mark.parametrize("name", BY_NAME)
def test_recipes_are_sound(name: str) -> None:
    config = BY_NAME[name]()
    for world in (None, smallest_world(config.model)):
        problems = list(check(config, world))
        assert len(problems) == needs_transformer_engine(name), problems


@pytest.mark.parametrize(
    ("name", "world", "ranks"),
    # As Megatron-Bridge's names have it: gpt_oss_20b_pretrain_16gpu_..., 120b_sft_32gpu_...
    [("20b_pretrain", 16, 2), ("120b_pretrain", 64, 8), ("20b_sft", 8, 8), ("120b_sft", 32, 8),
     ("20b_peft", 1, 1), ("120b_peft", 8, 8), ("120b_sft_32k", 48, 1)],
)  # fmt: skip
def test_number_of_processes(name: str, world: int, ranks: int) -> None:
    config = BY_NAME[f"gpt_oss_{name}_config"]()
    assert smallest_world(config.model) == world
    assert data_parallel(config.model, world) == ranks
    assert microbatches(config, world) == config.train.global_batch_size // ranks


PRE, FINE = gpt_oss_20b_pretrain_config(), gpt_oss_20b_sft_config()
LONG = BY_NAME["gpt_oss_120b_sft_32k_config"]()
CONTRADICTIONS = [
    (PRE, None, ["train.global_batch_size=511"], "is no multiple of 2", "train.global_batch_size=512"),
    (FINE, 24, ["train.global_batch_size=100"], "24 data-parallel ranks", "train.global_batch_size=96"),
    (PRE, None, ["train.micro_batch_size=3"], "is no multiple of 6", "train.global_batch_size=510"),
    (PRE, None, ["model.pipeline_model_parallel_size=5"], "does not divide the model's 24 layers",
     "model.pipeline_model_parallel_size=6"),
    (PRE, None, ["model.virtual_pipeline_model_parallel_size=4"], "6 layers of a stage",
     "model.virtual_pipeline_model_parallel_size=3"),
    (FINE, None, ["model.virtual_pipeline_model_parallel_size=2"], "needs several pipeline stages",
     "model.virtual_pipeline_model_parallel_size=null"),
    (PRE, None, ["model.virtual_pipeline_model_parallel_size=2", "train.global_batch_size=6"],
     "makes 3 microbatches", "train.global_batch_size=8"),
    (PRE, None, ["model.tensor_model_parallel_size=3"], "64 heads, 8 query groups and 201088 tokens",
     "model.tensor_model_parallel_size=4"),
    (PRE, None, ["model.expert_model_parallel_size=5"], "does not divide the model's 32 experts",
     "model.expert_model_parallel_size=4"),
    (PRE, None, ["model.expert_tensor_parallel_size=2"], "no experts with biases",
     "model.expert_tensor_parallel_size=1"),
    (LONG, None, ["model.context_parallel_size=8", "dataset.pad_seq_to_mult=16"], "4 query groups of a tensor parallel rank",
     "model.context_parallel_size=4"),
    (FINE, None, ["model.sequence_parallel=true"], "is on with model.tensor_model_parallel_size 1",
     "model.sequence_parallel=false"),
    (PRE, None, ["model.sequence_parallel=false"], "experts need it", "model.sequence_parallel=true"),
    (PRE, None, ["dataset.sequence_length=2048"], "are not one", "dataset.sequence_length=4096"),
    (PRE, None, ["model.seq_length=4097", "dataset.sequence_length=4097"], "into 2 parts",
     "model.seq_length=4098 dataset.sequence_length=4098"),
    (FINE, None, ["model.seq_length=131073", "dataset.sequence_length=131073"], "131072 tokens",
     "model.seq_length=131072 dataset.sequence_length=131072"),
    (LONG, None, ["dataset.pad_seq_to_mult=4"], "no multiple of 8", "dataset.pad_seq_to_mult=8"),
    (FINE, None, ["train.train_iters=50"], "is not less than train.train_iters 50",
     "scheduler.lr_warmup_iters=49"),
    (FINE, None, ["scheduler.lr_decay_iters=20"], "less than scheduler.lr_decay_iters 20",
     "scheduler.lr_warmup_iters=19"),
    (FINE, None, ["optimizer.min_lr=1"], "is more than optimizer.lr 5e-06", "optimizer.min_lr=5e-06"),
    (FINE, None, ["scheduler.lr_warmup_init=1"], "is more than", "scheduler.lr_warmup_init=0"),
    (FINE, None, ["scheduler.lr_decay_style=WSD"], "needs scheduler.lr_wsd_decay_iters",
     "scheduler.lr_wsd_decay_iters=100"),
    (FINE, None, ["scheduler.end_weight_decay=0.1"], "weight decay goes from 0.033 to 0.1",
     "scheduler.end_weight_decay=0.033"),
    (PRE, None, ["ddp.average_in_collective=true"], "calculate_per_token_loss",
     "ddp.average_in_collective=false"),
    (PRE, None, ["optimizer.use_distributed_optimizer=false"], "needs optimizer.use_distr",
     "ddp.overlap_param_gather=false"),
    (PRE, None, ["ddp.overlap_grad_reduce=false"], "needs ddp.overlap", "ddp.overlap_grad_reduce=true"),
    (FINE, None, ["model.recompute_granularity=full", "model.recompute_num_layers=1"],
     "needs a method", "model.recompute_method=uniform"),
    (FINE, None, ["model.recompute_granularity=full", "model.recompute_method=block"],
     "needs a number", "model.recompute_num_layers=1"),
    (FINE, None, ["model.recompute_granularity=full", "model.recompute_method=block",
                  "model.recompute_num_layers=25"], "24 layers of a stage",
     "model.recompute_num_layers=24"),
    (FINE, None, ["model.recompute_num_layers=2"], "granularity full", "model.recompute_num_layers=null"),
    (FINE, None, ["model.recompute_modules=[moe_act]"], "granularity selective",
     "model.recompute_granularity=selective"),
    (FINE, None, ["train.micro_batch_size=2"], "a pack is a batch", "train.micro_batch_size=1"),
    (FINE, None, ["dataset.dataset_name=null"], "has neither", "dataset.dataset_name=squad"),
    (FINE, None, ["dataset.loss_channels=[]"], "nothing would be learned",
     "dataset.loss_channels=[final]"),
    (FINE, None, ["dataset.pad_seq_to_mult=24"], "2048 is no multiple of dataset.pad_seq_to_mult 24",
     "dataset.sequence_length=2040 model.seq_length=2040"),
    (FINE, None, ["dataset.conversation_date='2025-8-5'"], "is no date",
     "dataset.conversation_date=2025-08-05"),
    (FINE, None, ["tokenizer.tokenizer_type=NullTokenizer"], "reads no text",
     "tokenizer.tokenizer_type=HuggingFaceTokenizer"),
    (FINE, None, ["checkpoint.most_recent_k=0"], "keeps no checkpoint", "checkpoint.most_recent_k=1"),
    (FINE, None, ["peft=lora", "peft.target_modules=[]"], "nothing would be trained",
     "peft.target_modules=[linear_qkv]"),
    (FINE, None, ["peft=lora", "peft.alpha=0"], "change nothing", "peft.alpha=32"),
    (FINE, None, ["model.num_query_groups=7"], "does not divide the model's 64 heads",
     "model.num_query_groups=8"),
    (FINE, None, ["model.moe_router_topk=33"], "is more than", "model.moe_router_topk=32"),
    (FINE, None, ["model.kv_channels=63"], "is odd", "model.kv_channels=64"),
    (PRE, None, ["dataset.blend=[[a,b],[1]]"], "2 files and 1 weights", "dataset.blend=[[a,b],null]"),
    (PRE, None, ["dataset.blend=[[],null]"], "has no files", "dataset.blend=null"),
    (PRE, None, ["dataset.split=0,1,1"], "is not three weights", "dataset.split='9999,8,2'"),
    (PRE, None, ["dataset.split=most"], "is not three weights", "dataset.split='9999,8,2'"),
    (gpt_oss_20b_sft_config().having(mixed_precision={"fp8": None}), None,
     ["mixed_precision=bf16_with_mxfp8_mixed"], "MXFP8 needs Transformer Engine",
     "mixed_precision=bf16_mixed"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "world", "words", "told", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_told_and_its_remedy_works(
    config: TrainingConfig, world: int | None, words: list[str], told: str, remedy: str
) -> None:
    if "MXFP8" in told and importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    wrong = override(config, words)
    (problem,) = check(wrong, world)
    assert told in problem
    assert f"say {remedy.split()[0]}" in problem or "say [final]" in problem or "null in" in problem
    mended = override(wrong, remedy.split())
    assert list(check(mended, world)) == []


@pytest.mark.parametrize(
    ("world", "told"), [(3, "start 16"), (17, "start 16"), (24, "start 32"), (40, "start 48")]
)
def test_a_world_that_does_not_fit(world: int, told: str) -> None:
    (problem,) = check(PRE, world)
    assert problem.startswith(f"{world} processes do not make up a layout of 16")
    assert problem.endswith(told)


def test_all_problems_come_at_once() -> None:
    words = ["train.train_iters=5", "optimizer.min_lr=1", "model.sequence_parallel=true"]
    wrong = override(FINE, words)
    problems = list(check(wrong))
    assert len(problems) == 3
    with pytest.raises(RecipeError, match="3 problems") as caught:
        require_sound(wrong)
    assert sorted(problems) == list(caught.value.problems)
    assert caught.value.exit_code == 2
    require_sound(FINE, 8)
