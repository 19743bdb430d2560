"""Adapters in megatron-core's model: merged as it is loaded, or live beside its linears."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from adapters import PROMPT, alike, load_onto, logits, with_adapter
from tiny_gptoss import tiny_model

from gptoss_convert.layout import Layout
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import Choice
from gptoss_convert.registry import default_registry

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

Run = Callable[..., Any]
CHOICE = Choice()


@pytest.fixture(scope="module", params=["", "square"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model in two formats, adapters of it in two, one of each expert and one shared."""
    from click.testing import CliRunner

    from gptoss_convert.cli import main

    def run(*words: Any) -> None:
        done = CliRunner().invoke(main, list(map(str, words)))
        assert done.exit_code == 0, done.output

    folder = tmp_path_factory.mktemp("made")
    sizes = {"num_hidden_layers": 2, **({"intermediate_size": 48} if request.param else {})}
    tiny_model(**sizes).save_pretrained(folder / "hf")
    run("import", "--hf-model", folder / "hf", "--megatron-path", folder / "megatron")
    found: dict[str, Any] = {"folder": folder}
    for kind in ("each", "shared"):
        with_adapter(tiny_model(**sizes)).save_pretrained(folder / f"{kind} peft")
        if kind == "shared":
            alike(folder / f"{kind} peft", "shared")
        found[kind] = logits(load_onto(tiny_model(**sizes), folder / f"{kind} peft"))
        words = ("--adapter", folder / f"{kind} peft", "--hf-model", folder / "hf")
        run("adapter", "import", *words, "--output", folder / f"{kind} megatron")
    return found


def model_logits(live: Any) -> Tensor:
    from gptoss_plugins.gpt_model.forward import logits as run

    found = run(live.models, PROMPT)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("base", ["hf", "megatron"])
@pytest.mark.parametrize("form", ["peft", "megatron"])
@pytest.mark.parametrize("kind", ["each", "shared"])
def test_merged_as_it_is_loaded(kind: str, form: str, base: str, made: dict[str, Any]) -> None:
    from gptoss_plugins.adapter.merging import with_adapter as adapted
    from gptoss_plugins.gpt_model.filling import fill, load_by_megatron
    from gptoss_plugins.gpt_model.live import build_live
    from gptoss_plugins.gpt_model.world import world_of

    registry, folder = default_registry(), made["folder"]
    plain = open_logical(folder / base, registry, CHOICE)
    both = adapted(plain, folder / f"{kind} {form}", registry, is_exact=True)
    with world_of(Layout(), "cpu") as place:
        live = build_live(plain.fields, Layout(), registry, place, torch.float32)
        for load in (fill, load_by_megatron):
            fill(live, plain)
            assert (model_logits(live) - made[kind]).abs().max() > 0.01
            load(live, both)
            assert (model_logits(live) - made[kind]).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["peft", "megatron"])
@pytest.mark.parametrize("kind", ["each", "shared"])
def test_live_beside_the_linears(kind: str, form: str, made: dict[str, Any]) -> None:
    """And the base is as it was, in every bit, under the names it had."""
    from gptoss_plugins.adapter.modules import add_adapters
    from gptoss_plugins.adapter.opening import open_adapter
    from gptoss_plugins.gpt_model.filling import fill
    from gptoss_plugins.gpt_model.live import build_live
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.config import LoRA

    registry, folder = default_registry(), made["folder"]
    plain = open_logical(folder / "hf", registry, CHOICE)
    path = folder / f"{kind} {form}"
    adapter = open_adapter(path, plain.family, plain.config, registry, "the model")
    # q, k and v have an A of their own each, so A of linear_qkv has three times the rank
    lora = [
        LoRA(9, 15.0, share_expert_adapters=kind == "shared", target_modules=("linear_qkv",)),
        LoRA(3, 5.0, share_expert_adapters=kind == "shared", target_modules=("linear_proj",)),
        LoRA(
            3,
            5.0,
            share_expert_adapters=kind == "shared",
            target_modules=("linear_fc1", "linear_fc2"),
        ),
    ]
    with world_of(Layout(), "cpu") as place:
        live = build_live(plain.fields, Layout(), registry, place, torch.float32)
        fill(live, plain)
        before = {n: p.detach().clone() for n, p in live.models[0].named_parameters()}
        alone = model_logits(live)
        for one in lora:
            add_adapters(live, one, seed=7)
        assert torch.equal(model_logits(live), alone)
        fill(live, adapter.logical)
        assert (model_logits(live) - made[kind]).abs().max() < 1e-5
        after = dict(live.models[0].named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert all(".adapter." in name for name in after.keys() - before.keys())


def test_verify_judges_a_merge(made: dict[str, Any], tmp_path: Path, invoke: Run) -> None:
    """Tensors and logits of base and adapter are those of the merged model, and not of the base."""
    folder = made["folder"]
    words = ("--adapter", folder / "each megatron", "--hf-model", folder / "hf")
    done = invoke("adapter", "merge", *words, "--hf-path", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    look = ("--logits", "--prompt-length", 40, "--torch-dtype", "float32")
    for base, adapter, code in (("hf", "each peft", 0), ("hf", "shared peft", 3), ("hf", "", 3)):
        more = ("--adapter", folder / adapter) if adapter else ()
        done = invoke("verify", folder / base, tmp_path / "merged", *more, *look, "--json")
        assert done.returncode == code, done.stdout + done.stderr
