"""``generate`` and ``chat``: text from every kind of checkpoint, the same as transformers' own.

Logits of these random models have no near ties, so equal tokens mean equal models.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptoss_convert.convert import export_checkpoint, import_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

Run = Callable[..., subprocess.CompletedProcess[str]]
SUPPORT = Path(__file__).parent / "support"
KINDS = ("mxfp4", "torch_dist", "bf16", "torch")
# (tp, pp, ep), ranks
LAYOUTS = [
    ((2, 1, 1), 2),
    ((1, 2, 1), 2),
    ((1, 1, 2), 2),
    ((2, 1, 2), 2),
    ((2, 2, 2), 4),
    ((1, 2, 2), 4),
    ((4, 1, 2), 4),
]
IN_CI: tuple[tuple[tuple[int, ...], int], ...] = ()  # tests/test_live_roundtrip.py has one
NEW = 64
# A token a character, and no two parts alike: 1, 100, 300 and 5000 tokens, beyond the window (128) and
# beyond YaRN's original length (4096).
DIGITS = "".join(f"{n * n} " for n in range(1, 999))
SHORT = ["7", DIGITS[:100], DIGITS[50:350]]
LONG = DIGITS[:5000]


@pytest.fixture(scope="module")
def support() -> SimpleNamespace:
    names = ("tiny_gptoss.py", "tiny_tokenizer.py")
    return SimpleNamespace(
        **{k: v for name in names for k, v in runpy.run_path(str(SUPPORT / name)).items()}
    )


@pytest.fixture(scope="module")
def folders(support: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four kinds of checkpoint of one model, by name, each with its tokenizer.

    Weights are large enough that every feature shows in what is said.
    """
    folder = tmp_path_factory.mktemp("generate")
    support.YARN["original_max_position_embeddings"] = 4096
    model = support.tiny_model(
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=4,
        vocab_size=320,
        sliding_window=128,
        max_position_embeddings=131072,
        eos_token_id=319,
    )
    model.bfloat16().save_pretrained(folder / "silent")
    support.write_tokenizer(folder / "tokenizer")
    shutil.copytree(folder / "silent", folder / "trained")
    shutil.copytree(folder / "tokenizer", folder / "trained", dirs_exist_ok=True)
    run("quantize", "--hf-model", folder / "trained", "--hf-path", folder / "mxfp4")
    import_checkpoint(folder / "mxfp4", folder / "torch_dist")
    export_checkpoint(folder / "torch_dist", folder / "bf16", export_dtype="bfloat16")
    ends = ["--megatron-path", folder / "torch_dist", "--output", folder / "torch"]
    run("reshard", *ends, "--format", "torch", "--tp", "2", "--ep", "2")
    return {name: folder / name for name in (*KINDS, "silent")}


def run(*arguments: object) -> None:
    command = [sys.executable, "-m", "gptoss_convert", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str], list[int]]:
    """Prompt -> the ids that transformers makes of it, in float32 and greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folders["bf16"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["bf16"])
    known: dict[str, list[int]] = {}

    def make(prompt: str) -> list[int]:
        if prompt not in known:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
            )
            known[prompt] = made[0, ids.shape[1] :].tolist()
        return known[prompt]

    return make


def source_of(folders: dict[str, Path], kind: str) -> list[object]:
    flag = "--hf-model" if kind in ("mxfp4", "bf16") else "--megatron-path"
    return [flag, folders[kind]]


def command_of(folders: dict[str, Path], kind: str, prompts: list[str], *more: object) -> list[str]:
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    numbers = ["--max-new-tokens", NEW, "--torch-dtype", "float32", "--json", *more]
    return list(map(str, ["generate", *source_of(folders, kind), *asked, *numbers]))


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    rows: list[dict[str, Any]] = found["results"]
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_a_batch(
    kind: str, folders: dict[str, Path], expected: Any, invoke: Run
) -> None:
    rows = results(invoke(*command_of(folders, kind, SHORT)))
    assert [len(row["prompt_ids"]) for row in rows] == [1, 100, 300]
    assert len({token for row in rows for token in row["ids"]}) > 20, "the model says too little"
    for prompt, row in zip(SHORT, rows, strict=True):
        assert row["ids"] == expected(prompt)
        assert row["reason"] == ("stop" if len(row["ids"]) < NEW else "length")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [*SHORT, LONG], ids=lambda prompt: str(len(prompt)))
def test_one_by_one(prompt: str, folders: dict[str, Path], expected: Any, invoke: Run) -> None:
    (row,) = results(invoke(*command_of(folders, "torch_dist", [prompt])))
    assert row["ids"] == expected(prompt)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [pytest.param(*case, marks=() if case in IN_CI else pytest.mark.slow) for case in LAYOUTS],
)
def test_every_layout(
    sizes: tuple[int, ...], ranks: int, folders: dict[str, Path], expected: Any
) -> None:
    """The long prompt too: past the window on every rank, and past YaRN's original length."""
    layout = [
        part for name, n in zip(("--tp", "--pp", "--ep"), sizes, strict=True) for part in (name, n)
    ]
    prompts = [*SHORT, LONG]
    rows = results(launched(ranks, *command_of(folders, "torch_dist", prompts, *layout)))
    assert [row["ids"] for row in rows] == [expected(prompt) for prompt in prompts]


def launched(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launch, "-m", "gptoss_convert", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_text_is_streamed_and_ends_with_figures(folders: dict[str, Path], invoke: Run) -> None:
    command = ["generate", *source_of(folders, "bf16"), "--prompt", "hello", "--max_new_tokens", 5]
    done = invoke(*command)
    (row,) = results(invoke(*command, "--json"))
    assert done.returncode == 0, done.stderr
    assert "5 prompt tokens, 5 new" in done.stderr
    assert "first token after" in done.stderr
    assert "tokens/s" in done.stderr
    assert "peak memory" in done.stderr
    assert done.stdout == row["text"] + "\n"


def test_a_stop_text_ends_it(folders: dict[str, Path], invoke: Run) -> None:
    command = command_of(folders, "bf16", [SHORT[1]])
    (whole,) = results(invoke(*command))
    middle = len(whole["text"]) // 2
    stop = whole["text"][middle : middle + 3]
    (row,) = results(invoke(*command, "--stop", stop, "--stop", "never to be seen"))
    assert row["text"] == whole["text"][: whole["text"].index(stop)]
    assert row["reason"] == "text"
    assert whole["ids"][: len(row["ids"])] == row["ids"]


def test_prompts_from_a_file(folders: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    (tmp_path / "prompts").write_text("hello\n\nhéllo\n")
    command = ["generate", *source_of(folders, "bf16"), "--prompt-file", tmp_path / "prompts"]
    rows = results(invoke(*command, "--max-new-tokens", 3, "--json"))
    assert [row["prompt"] for row in rows] == ["hello", "héllo"]


@pytest.mark.slow
def test_draws_are_the_seeds(folders: dict[str, Path], invoke: Run) -> None:
    def ids(*more: object) -> list[list[int]]:
        draw = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", *more]
        return [row["ids"] for row in results(invoke(*command_of(folders, "bf16", SHORT, *draw)))]

    assert ids() == ids("--seed", "0")
    assert ids() != ids("--seed", "1")


def test_one_shot_chat_is_the_templates_prompt(folders: dict[str, Path], invoke: Run) -> None:
    from transformers import AutoTokenizer

    more = ["--chat", "--system", "Be brief.", "--reasoning", "high", "--max-new-tokens", "4"]
    (row,) = results(invoke(*command_of(folders, "torch_dist", ["hello"], *more)))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    wanted = AutoTokenizer.from_pretrained(folders["bf16"]).apply_chat_template(
        said, add_generation_prompt=True, reasoning_effort="high", return_dict=False
    )
    assert row["prompt_ids"] == wanted
    assert isinstance(row["messages"], list)


def test_a_conversation(folders: dict[str, Path], tmp_path: Path, invoke: Run) -> None:
    """Two turns from a pipe; every message is kept, and the second prompt holds the first turn."""
    command = ["chat", *source_of(folders, "torch_dist"), "--max-new-tokens", "9"]
    done = invoke(*command, "--save", tmp_path / "said.jsonl", input="hello\nto you\n")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["content"] for line in said if line["role"] == "user"] == ["hello", "to you"]
    assert sum(line["role"] == "user" for line in said) < len(said)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no checkpoint named": (["--prompt", "x"], "name a checkpoint"),
    "no prompt": (["--hf-model", "{bf16}"], "Missing option '--prompt'"),
    "no such folder": (["--hf-model", "/nowhere/at/all", "--prompt", "x"], "/nowhere/at/all"),
    "too long": (["--hf-model", "{bf16}", "--prompt", "x" * 131073], "takes 131072 at most"),
    "no gpu": (["--hf-model", "{bf16}", "--prompt", "x", "--device", "cuda"], "finds no GPU"),
    "no world": (["--hf-model", "{bf16}", "--prompt", "x", "--tp", "2"], "needs 2 processes"),
    "empty prompt": (["--hf-model", "{bf16}", "--prompt", ""], "is empty"),
    "no number": (
        ["--hf-model", "{bf16}", "--prompt", "x", "--temperature", "nan"],
        "is no number",
    ),
    "empty stop": (["--hf-model", "{bf16}", "--prompt", "x", "--stop", ""], "--stop is empty"),
    "effort alone": (
        ["--hf-model", "{bf16}", "--prompt", "x", "--reasoning", "high"],
        "--reasoning is for conversations",
    ),
    "a folder of prompts": (["--hf-model", "{bf16}", "--prompt-file", "{bf16}"], "bf16"),
    "top-k alone": (["--hf-model", "{bf16}", "--prompt", "x", "--top-k", "5"], "--temperature"),
    "no tokenizer": (["--hf-model", "{silent}", "--prompt", "x"], "tokenizer.json"),
    "no file": (["--hf-model", "{bf16}", "--prompt-file", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str, folders: dict[str, Path], invoke: Run) -> None:
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is one")
    arguments, sentence = REFUSED[case]
    done = invoke("generate", *(argument.format_map(folders) for argument in arguments))
    assert done.returncode in (1, 2), done.stdout
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("draw", [[], ["--temperature", "1"]])
def test_logits_that_are_no_numbers(
    draw: list[str], folders: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["bf16"], tmp_path / "hf")
    (path,) = [
        p for p in (tmp_path / "hf").glob("*.safetensors") if "model.norm.weight" in load_file(p)
    ]
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    done = invoke("generate", "--hf-model", tmp_path / "hf", "--prompt", "x", *draw)
    assert done.returncode == 1
    assert "logits are NaN or infinite" in done.stderr


def test_a_stop_text_in_harmony(folders: dict[str, Path], invoke: Run) -> None:
    """It is looked for in messages, not between them, and cuts text, messages and screen alike."""
    command = command_of(folders, "bf16", ["hello"], "--chat", "--max-new-tokens", "40")
    (whole,) = results(invoke(*command))
    said = whole["messages"][0]["content"]
    stop = said[len(said) // 2 : len(said) // 2 + 3]
    (row,) = results(invoke(*command, "--stop", stop))
    assert row["messages"][-1]["content"] == said[: said.index(stop)]
    assert row["reason"] == "text"
    shown = invoke(*(part for part in command if part != "--json"), "--stop", stop).stdout
    assert shown.endswith(said[: said.index(stop)] + "\n")


def test_a_bad_turn_does_not_end_a_conversation(
    folders: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    command = ["chat", *source_of(folders, "torch_dist"), "--max-new-tokens", "5"]
    turns = "hello\n" + "x" * 140_000 + "\nto you\n"
    done = invoke(*command, "--save", tmp_path / "said.jsonl", input=turns)
    assert done.returncode == 0, done.stderr
    assert "takes 131072 at most" in done.stderr
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["content"] for line in said if line["role"] == "user"] == ["hello", "to you"]


@pytest.mark.slow
def test_prompts_from_standard_input(folders: dict[str, Path]) -> None:
    """On two ranks: the first one reads, the other hears of it."""
    command = ["generate", *source_of(folders, "torch_dist"), "--prompt-file", "-", "--tp", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "gptoss_convert", *map(str, command), "--max-new-tokens", "3", "--json"],
        input="hello\u2028you\nto\r\n",
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert [row["prompt"] for row in results(done)] == ["hello\u2028you", "to"]


def test_another_models_tokenizer(
    folders: dict[str, Path], write_tiny: Any, tmp_path: Path, invoke: Run
) -> None:
    made = write_tiny(tmp_path / "small", vocab_size=131)
    place = folders["bf16"]
    done = invoke("generate", "--hf-model", made, "--tokenizer", place, "--prompt", "<|call|>")
    assert done.returncode == 2
    assert "another model's tokenizer" in done.stderr
    done = invoke("generate", "--hf-model", made, "--tokenizer", place, "--prompt", "a")
    assert "is it another model's?" in done.stderr
