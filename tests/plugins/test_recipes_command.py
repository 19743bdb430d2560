"""``gptoss-convert recipes``: the list, one recipe, what it refuses, recipes of third parties."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gptoss_convert.cli import main
from gptoss_convert.errors import UsageError
from gptoss_convert.registry import Registry
from gptoss_plugins.train.choosing import chosen
from gptoss_plugins.train.files import from_yaml
from gptoss_plugins.train.overrides import override
from gptoss_plugins.train.plain import from_plain
from gptoss_plugins.train.recipes import (
    RECIPES,
    gpt_oss_20b_sft_config,
    tiny_pretrain_config,
)

BY_NAME = {make.__name__: make for make in RECIPES}
FINE = gpt_oss_20b_sft_config()

# --- the command ----------------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = CliRunner().invoke(main, ["recipes", *words], standalone_mode=True)
    return done.exit_code, done.stdout, done.stderr


def test_the_list() -> None:
    code, out, _ = run()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(BY_NAME)
    (row,) = [line for line in out.splitlines() if line.startswith("gpt_oss_120b_sft_32k_config ")]
    assert row.split()[1:9] == ["120b", "48", "tp2", "pp6", "ep4", "cp4", "4/1", "32768"]


def test_the_list_as_json() -> None:
    code, out, _ = run("--json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "gptoss-convert.recipes/1")
    entries = {entry.pop("name"): entry for entry in document["recipes"]}
    assert list(entries) == list(BY_NAME)
    assert entries["gpt_oss_20b_pretrain_config"] == {
        "summary": "Pretraining of 20B in bf16.",
        "problem": None,
        "size": "20b",
        "parameters": 20_914_757_184,
        "data": "pretrain",
        "peft": False,
        "precision": "bf16",
        "layout": {"tp": 2, "pp": 4, "vpp": 1, "ep": 4, "etp": 1, "cp": 1},
        "processes": 16,
        "global_batch_size": 512,
        "micro_batch_size": 1,
        "sequence_length": 4096,
        "train_iters": 1_000_000,
    }


def test_one_recipe_is_shown_as_yaml_that_can_be_read(tmp_path: Path) -> None:
    code, out, err = run("tiny_pretrain", "train.train_iters=60", "dataset.blend=[a,b]")
    assert (code, err) == (0, "")
    (tmp_path / "a.yaml").write_text(out)
    wanted = override(tiny_pretrain_config(), ["train.train_iters=60", "dataset.blend=[a,b]"])
    assert from_yaml(tmp_path / "a.yaml") == wanted
    code, again, _ = run("--yaml", str(tmp_path / "a.yaml"), "rng.seed=5")
    assert (code, yaml.safe_load(again)["rng"]) == (0, {"seed": 5})


def test_problems_are_warnings() -> None:
    code, out, err = run("20b_sft", "train.train_iters=10")
    assert code == 0
    assert yaml.safe_load(out)["train"]["train_iters"] == 10
    assert err == (
        "warning: scheduler.lr_warmup_iters 50 is not less than train.train_iters 10; say "
        "scheduler.lr_warmup_iters=9\n"
    )


def test_one_recipe_as_json() -> None:
    code, out, _ = run("20b_sft", "train.train_iters=10", "--json")
    (entry,) = json.loads(out)["recipes"]
    assert (code, entry["name"], len(entry["problems"])) == (0, "gpt_oss_20b_sft_config", 1)
    assert from_plain(entry["config"]) == override(FINE, ["train.train_iters=10"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny_pretrian"], "there is no such recipe; did you mean tiny_pretrain_config?"),
        (["gpt_oss_20b_prtrain_config"], "did you mean gpt_oss_20b_pretrain_config?"),
        (
            ["tiny"],
            "did you mean tiny_peft_config, tiny_pretrain_config or tiny_sft_config?",
        ),
        (["gpt_oss_20b_fine"], "did you mean gpt_oss_20b_finetune_config?"),
        (["qwen"], "qwen: there is no such recipe; `gptoss-convert recipes` lists them"),
        (["train.train_iters=5"], "say before it which recipe it is to change"),
        (["tiny_sft", "train.trian_iters=5"], "did you mean train.train_iters?"),
        (["tiny_sft", "oops"], "oops: is no override"),
        (["tiny_sft", "--yaml", "a.yaml"], "name a recipe or a file, one of the two"),
        (["--yaml", "no-such.yaml"], "there is no such file"),
    ],
)
def test_a_wrong_command_ends_with_2(words: list[str], told: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert told in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_recipe_of_a_third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_recipes.py").write_text(
        "from gptoss_convert import Recipe, hookimpl\n"
        "@hookimpl\n"
        "def gptoss_convert_recipes():\n"
        "    yield Recipe('ours', 'Two steps', lambda n=2: {'train': {'train_iters': n}})\n"
        "    yield Recipe('other', 'Of another kind', lambda **kw: {'seq': 64})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipes = Registry([EntryPoint("theirs", "their_recipes", "gptoss_convert")]).recipes()
    assert chosen(recipes, "ours", None, []).train.train_iters == 2
    assert chosen(recipes, "ours", None, ["n=7"]).train.train_iters == 7
    with pytest.raises(UsageError, match="recipe other: seq: there is no section 'seq'"):
        chosen(recipes, "other", None, [])
    from gptoss_plugins.train.listing import described

    ours, other = described(recipes.values())
    assert (ours["problem"], ours["train_iters"]) == (None, 2)
    assert "there is no section" in other["problem"]


def test_recipes_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from gptoss_convert.cli import main\n"
        "sys.argv = ['gptoss-convert', 'recipes', 'tiny_sft', 'dataset.loss_channels=[final]']\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'megatron', 'transformers', 'numpy'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
