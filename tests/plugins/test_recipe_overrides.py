"""Recipes changed by overrides and kept as YAML: what is read, and what is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_convert.errors import UsageError
from gptoss_plugins.train.config import LoRA, MixedPrecisionConfig, ModelConfig, TrainingConfig
from gptoss_plugins.train.files import from_yaml, to_yaml
from gptoss_plugins.train.names import ALIASES, section_types
from gptoss_plugins.train.overrides import override
from gptoss_plugins.train.plain import from_plain, to_plain
from gptoss_plugins.train.reading import hints_of
from gptoss_plugins.train.recipes import (
    RECIPES,
    gpt_oss_20b_pretrain_config,
    gpt_oss_20b_sft_config,
)

BY_NAME = {make.__name__: make for make in RECIPES}
MXFP8 = MixedPrecisionConfig(
    fp8="e4m3",
    fp8_recipe="mxfp8",
    fp8_param_gather=True,
    reuse_grad_buf_for_mxfp8_param_ag=True,
)

# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "wanted"),
    [
        ("train.train_iters=100", "train.train_iters", 100),
        ("train.train_iters=1e3", "train.train_iters", 1000),
        ("train.train_iters=0123", "train.train_iters", 123),
        ("+train.train_iters=7", "train.train_iters", 7),
        ("++train.train_iters=7", "train.train_iters", 7),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=.5E-3", "optimizer.lr", 0.0005),
        ("optimizer.clip_grad=0", "optimizer.clip_grad", 0.0),
        ("checkpoint.save=null", "checkpoint.save", None),
        ("checkpoint.save=/data/a=b", "checkpoint.save", "/data/a=b"),
        ("checkpoint.save='null'", "checkpoint.save", "null"),
        ("checkpoint.save=${oc.env:HOME}", "checkpoint.save", "${oc.env:HOME}"),
        ("checkpoint.most_recent_k=-1", "checkpoint.most_recent_k", -1),
        ("logger.wandb_exp_name=0042", "logger.wandb_exp_name", "0042"),
        ("logger.wandb_exp_name=#1: yes", "logger.wandb_exp_name", "#1: yes"),
        ("model.sequence_parallel=True", "model.sequence_parallel", True),
        ("model.recompute_modules=[moe_act,moe]", "model.recompute_modules", ("moe_act", "moe")),
        ("dataset.split=9999,8,2", "dataset.split", "9999,8,2"),
        ('dataset.split="9999,8,2"', "dataset.split", "9999,8,2"),
        ("dataset.blend=[[/a/b,c],null]", "dataset.blend", (("/a/b", "c"), None)),
        ("dataset.blend=[[a,b],[0.3,1e-1]]", "dataset.blend", (("a", "b"), (0.3, 0.1))),
        ("dataset.blend=[a,b]", "dataset.blend", (("a", "b"), None)),
        ("dataset.blend=data/a", "dataset.blend", (("data/a",), None)),
        ("mixed_precision=bf16-with-mxfp8-mixed", "mixed_precision", MXFP8),
        ("peft=lora", "peft.dim", 32),
    ],
)
def test_an_override_is_read_as_users_write_it(word: str, name: str, wanted: Any) -> None:
    got: Any = override(gpt_oss_20b_pretrain_config(), [word])
    for part in name.split("."):
        got = getattr(got, part)
    assert (got, type(got)) == (wanted, type(wanted))


def test_an_override_changes_nothing_else() -> None:
    config = gpt_oss_20b_sft_config()
    changed = override(config, ["train.train_iters=100", "train.train_iters=200", "rng.seed=1"])
    assert changed == config.having(train={"train_iters": 200}, rng={"seed": 1})
    assert config == gpt_oss_20b_sft_config()


def test_adapters_can_be_named_and_then_changed() -> None:
    config = override(gpt_oss_20b_sft_config(), ["peft=lora", "peft.dim=8"])
    assert config.peft == LoRA(dim=8)


@pytest.mark.parametrize("old", ALIASES)
def test_names_of_other_versions_are_understood(old: str) -> None:
    section, _, field = ALIASES[old].partition(".")
    base = gpt_oss_20b_sft_config()
    text = {"use_distributed_optimizer": "false"}.get(field, "3")
    assert override(base, [f"{old}={text}"]) == override(base, [f"{ALIASES[old]}={text}"]) != base
    assert field in {name for kind in section_types()[section] for name in hints_of(kind)}


TRAIN_FIELDS = ", ".join(f.name for f in dataclasses.fields(gpt_oss_20b_sft_config().train))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "train.trian_iters=5",
            f"there is no such field; did you mean train.train_iters? train has {TRAIN_FIELDS}",
        ),
        ("+train.trian_iters=5", "train.trian_iters: .*did you mean train.train_iters"),
        ("trian.train_iters=5", "there is no section 'trian'; did you mean train.train_iters?"),
        ("train_iters=5", "did you mean train.train_iters[?] there are model, train, optimizer"),
        (
            "optimizer.train_iters=5",
            "did you mean train.train_iters[?] optimizer has optimizer, lr",
        ),
        ("train.zzz=5", "train.zzz: there is no such field; train has train_iters"),
        ("dataset.packing=true", "only fine-tuning has it, and this is pretraining"),
        ("dataset.kind=sft", "dataset.kind takes pretrain, and not 'sft'"),
        ("peft.dim=8", "peft is null here; say peft=lora before it"),
        ("peft=dora", "peft takes lora or null, and not 'dora'"),
        ("mixed_precision=fp9", "mixed_precision takes bf16_mixed or .*, and not 'fp9'"),
        ("model=20b", "model is a section; set one of its fields: size, num_layers"),
        ("~train.train_iters", "cannot be removed; say train.train_iters=null"),
        ("train.train_iters", "is no override; write it as section.field=value"),
        ("=5", "is no override"),
        ("checkpoint.save=", "checkpoint.save: is empty"),
        ("dataset.blend=[a", "dataset.blend: '\\[a' cannot be read; write a list as"),
        (
            "train.train_iters=many",
            "train.train_iters takes a whole number of 1 or more, and not 'many'",
        ),
        ("train.train_iters=1.5", "train.train_iters takes a whole number .* not '1.5'"),
        ("train.train_iters=0", "train.train_iters takes .* of 1 or more, and not '0'"),
        ("train.train_iters=2:30", "train.train_iters takes .* and not '2:30'"),
        ("train.train_iters=null", "train.train_iters takes .* and not null"),
        ("train.train_iters=[1]", "train.train_iters takes .* and not \\[1\\]"),
        ("train.train_iters={a: 1}", "train.train_iters takes .* and not {'a': 1}"),
        ("optimizer.lr=fast", "optimizer.lr takes a number of 0 or more, and not 'fast'"),
        ("optimizer.lr=inf", "optimizer.lr takes"),
        ("optimizer.lr=1e999", "optimizer.lr takes"),
        ("optimizer.adam_beta2=1.5", "optimizer.adam_beta2 takes a number from 0 to below 1"),
        ("optimizer.optimizer=adamw", "optimizer.optimizer takes adam or sgd, and not 'adamw'"),
        (
            "model.sequence_parallel=yes",
            "model.sequence_parallel takes true or false, and not 'yes'",
        ),
        ("model.recompute_modules=[mlp]", "takes a list of any of core_attn, moe_act, layernorm"),
        ("dataset.blend=[[a],[b]]", "dataset.blend takes \\[\\[path, ...\\], \\[weight"),
        ("dataset.blend=[[a],[-1]]", "dataset.blend takes"),
        ("checkpoint.ckpt_format=zarr", "checkpoint.ckpt_format takes torch_dist, and not 'zarr'"),
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay has no effect where"),
    ],
)
def test_what_cannot_be_an_override_is_told_in_a_sentence(word: str, told: str) -> None:
    with pytest.raises(
        UsageError, match=told.replace("?", "[?]").replace("[[?]]", "[?]")
    ) as caught:
        override(gpt_oss_20b_pretrain_config(), [word])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_the_weight_decay_can_be_the_optimizers() -> None:
    null = [f"scheduler.{end}_weight_decay=null" for end in ("start", "end")]
    config = override(gpt_oss_20b_sft_config(), ["optimizer.weight_decay=0.2", *null])
    assert (config.optimizer.weight_decay, config.scheduler.end_weight_decay) == (0.2, None)


# --- YAML -----------------------------------------------------------------------------------------


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes, in their own types."""
    from typing import Annotated, Literal, get_args, get_origin

    from gptoss_plugins.train.config.kinds import Within
    from gptoss_plugins.train.reading import alternatives

    args = get_args(hint)
    if get_origin(hint) is Annotated:
        limits = [one for one in hint.__metadata__ if isinstance(one, Within)]
        return values_of(args[0]).filter(lambda v: all(one.holds(v) for one in limits))
    if get_origin(hint) is Literal:
        return st.sampled_from(args)
    if get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return st.lists(values_of(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, args))
    if len(several := alternatives(hint)) > 1:
        return st.one_of(*map(values_of, several))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-1, 10**18),
        float: st.floats(0, 1e300) | st.floats(0, 0.999),
        bool: st.booleans(),
        type(None): st.none(),
        str: st.text(max_size=9)
        | st.sampled_from(["null", "1e-4", "0123", "yes", "2:30", "~", "- a"]),
    }
    if hint in simple:
        return simple[hint]
    return st.builds(hint, **{name: values_of(one) for name, one in hints_of(hint).items()})


@settings(max_examples=30, deadline=None)
@given(config=values_of(TrainingConfig))
def test_yaml_gives_any_config_back(
    tmp_path_factory: pytest.TempPathFactory, config: TrainingConfig
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config


@pytest.mark.parametrize("name", BY_NAME)
def test_yaml_gives_a_recipe_back(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text(to_yaml(BY_NAME[name]()))
    assert from_yaml(tmp_path / "a.yaml") == BY_NAME[name]()


def test_yaml_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optimizer: {lr: 1e-4}\ntrain:\n  train_iters: 1e3\ndataset: {kind: sft}\n")
    config = from_yaml(path)
    assert (config.optimizer.lr, config.train.train_iters) == (1e-4, 1000)
    assert config.dataset.kind == "sft"
    assert config.model == ModelConfig()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {trian_iters: 5}", "train.trian_iters: there is no such field; did you mean"),
        ("trian: {}", "trian: there is no section 'trian'; did you mean train"),
        ("train: {train_iters: many}", "train.train_iters takes a whole number"),
        ("train: 5", "train is a section with fields, and not 5"),
        ("- 1", "a config has sections with fields"),
        ("", "a config has sections with fields, and is not null"),
        ("dataset: {kind: images}", "dataset.kind takes pretrain or sft, and not 'images'"),
        ("dataset: {kind: [sft]}", "dataset.kind takes pretrain or sft, and not"),
        ("dataset: {packing: true}", "only fine-tuning has it"),
        ("rng: {seed: 1, seed: 2}", "'seed' stands twice"),
        ("rng: &a {seed: 1}\ntrain: *a", "it has aliases"),
        ("x: !!python/object/apply:os.system [ls]", "is no config in YAML"),
        ("[" * 3000, "is no config in YAML"),
        ("a: " + "{a: " * 30, "is no config in YAML"),
        ("  " + "- " * 5000, "is no config in YAML"),
        ("{[1]: 2}", "is no config in YAML|no section"),
        ("rng: {seed: !!bool x}", "is no config in YAML"),
        ("rng: {seed: !!timestamp x}", "is no config in YAML"),
        ("rng: {seed: 2024-01-01}", "rng.seed takes a whole number"),
        ("rng: {seed: !!binary aaaa}", "rng.seed takes a whole number"),
        ("1: 2", "1: there is no section"),
        ("rng: {1: 2}", "rng.1: there is no such field"),
        ("\x00", "is no config in YAML"),
        ("a" * (65 << 10), "takes 66,560 bytes where 65,536 would be many"),
    ],
)
def test_yaml_that_is_no_config(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        from_yaml(tmp_path / "a.yaml")
    assert "a.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


PIECES = ["rng", "seed", "dataset", "kind", ": ", "\n", "  ", "- ", "{", "}", "[", "]", "5", "sft", "? ",
          "!!set ", "!!omap ", "!!float ", "&a ", "*a", "<<", "'", '"', "|", "\t", "#", "%", "~"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@example(text="!!float ")
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20))
def test_any_file_is_a_config_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    try:
        told = to_yaml(from_yaml(path))
    except UsageError as error:
        told = str(error)
    assert told.startswith(("model:\n", str(path)))


def test_yaml_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file; check the path"):
        from_yaml(tmp_path / "a.yaml")


def test_fields_that_follow_another(tmp_path: Path) -> None:
    """Saving in a place means going on there; tensor parallelism brings sequence parallelism."""
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.train.choosing import chosen

    def fields(*words: str) -> tuple[str | None, bool]:
        config = chosen(default_registry().recipes(), "tiny_pretrain", None, words)
        return config.checkpoint.load, config.model.sequence_parallel

    place = f"checkpoint.save={tmp_path}"
    cut = "model.tensor_model_parallel_size=2"
    assert fields(place, cut) == (str(tmp_path), True)
    own = fields(place, "checkpoint.load=other", cut, "model.sequence_parallel=false")
    assert own == ("other", False)


def test_the_last_of_two_words_holds_even_where_it_stands_twice() -> None:
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.train.choosing import chosen

    words = ("checkpoint.save=null", "checkpoint.save=a", "checkpoint.save=null")
    config = chosen(default_registry().recipes(), "tiny_pretrain", None, words)
    assert config.checkpoint.save is None
