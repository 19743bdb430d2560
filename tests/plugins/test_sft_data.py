"""Records of files into rows for training: the same samples packed or not, killed or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gptoss_convert.errors import CheckpointError, ConfigError, ResourceError, UsageError
from gptoss_plugins.data import units
from gptoss_plugins.data.sft import prepare, sft_datasets
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.making import Shape
from gptoss_plugins.data.sft.offline import pack_files
from gptoss_plugins.data.sft.presets import PRESETS
from gptoss_plugins.data.sft.records import BadRecordError
from gptoss_plugins.data.sft.samples import end_of_completion
from gptoss_plugins.data.sft.tokenizing import Job
from gptoss_plugins.infer.tokenizer import Tokenizer, load_tokenizer
from gptoss_plugins.train.config import SftDataset

pytest.importorskip("pyarrow")
from pyarrow import Table, parquet

SUPPORT = Path(__file__).parents[1] / "support"
support = SimpleNamespace(**runpy.run_path(str(SUPPORT / "sft_data.py")))
tiny = SimpleNamespace(**runpy.run_path(str(SUPPORT / "tiny_tokenizer.py")))

# From 5 to 44 places; each is another one.
RECORDS = [
    {"prompt": f"{n}?" + "q" * (n % 17), "completion": f"{n}!" + "a" * (n % 23)} for n in range(80)
]
LENGTH = 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found: Tokenizer = support.byte_tokenizer(tmp_path_factory.mktemp("bytes"))
    return found


@pytest.fixture
def config(tmp_path: Path) -> SftDataset:
    (tmp_path / "data").mkdir()
    support.write_lines(tmp_path / "data" / "training.jsonl", RECORDS)
    root = str(tmp_path / "data")
    return SftDataset(sequence_length=LENGTH, dataset_root=root, val_proportion=0.0)


def samples_of(rows: Any, epochs: int = 1) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """All samples in rows, their last token added again; padding left out."""
    found = []
    for number in range(epochs * len(rows)):
        row = {name: values.tolist() for name, values in rows[number].items()}
        for start in sorted(set(row["starts"])):
            places = [place for place, own in enumerate(row["starts"]) if own == start]
            assert places == [*range(start, start + len(places))]
            assert [row["positions"][place] for place in places] == [*range(len(places))]
            ids = [row["tokens"][place] for place in places] + [row["labels"][places[-1]]]
            assert [row["labels"][place] for place in places[:-1]] == ids[1:-1]
            mask = [row["loss_mask"][place] for place in places]
            if any(mask):
                found.append((tuple(ids), tuple(mask)))
            else:
                assert set(ids) == {257}  # <|padding|>
    return sorted(found)


def by_hand(record: dict[str, str]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    prompt, completion = record["prompt"].encode(), record["completion"].encode()
    mask = [0.0] * (len(prompt) - 1) + [1.0] * (len(completion) + 1)
    return (*prompt, *completion, 256), tuple(mask)


@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_once(packing: bool, config: SftDataset, tokenizer: Tokenizer) -> None:
    rows, held = sft_datasets(replace(config, packing=packing), tokenizer)
    assert held is None
    assert samples_of(rows) == sorted(map(by_hand, RECORDS))
    assert samples_of(rows, 2) == sorted([*map(by_hand, RECORDS)] * 2)
    for values in rows[3].values():
        assert values.shape == (LENGTH,)
    assert (len(rows) == len(RECORDS)) is not packing


def test_losses_packed_and_not(config: SftDataset, tokenizer: Tokenizer) -> None:
    """Of a table of bigrams, which sees no further than one token back: the same sum."""
    table = torch.randn(272, 272, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    losses = -table.log_softmax(dim=1)
    sums = []
    for packing in (True, False):
        rows, _ = sft_datasets(replace(config, packing=packing), tokenizer)
        each = [rows[number] for number in range(len(rows))]
        sums.append(
            sum(float((losses[r["tokens"], r["labels"]] * r["loss_mask"]).sum()) for r in each)
        )
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    assert sums[0] > 1000


def test_padding_to_a_multiple(config: SftDataset, tokenizer: Tokenizer) -> None:
    rows, _ = sft_datasets(replace(config, sequence_length=56, pad_seq_to_mult=8), tokenizer)
    found = []
    for number in range(len(rows)):
        row = rows[number]
        assert all(start % 8 == 0 for start in row["starts"].tolist())
        for start in row["starts"].unique().tolist():
            own = (row["starts"] == start) & (row["tokens"] != 257)
            ids = [*row["tokens"][own].tolist(), *row["labels"][own].tolist()[-1:]]
            found.append(tuple(token for token in ids if token != 257))
    expected = [by_hand(record)[0] for record in RECORDS]
    assert sorted(ids for ids in found if ids) == sorted(expected)


def test_validation(config: SftDataset, tokenizer: Tokenizer) -> None:
    everything = sorted(map(by_hand, RECORDS))
    rows, held = sft_datasets(replace(config, val_proportion=0.2), tokenizer)
    assert held is not None
    kept = samples_of(held)
    assert len(kept) == 16
    assert sorted([*samples_of(rows), *kept]) == everything
    _, other = sft_datasets(replace(config, val_proportion=0.2, random_seed=7), tokenizer)
    assert samples_of(other) != kept
    few = replace(config, val_proportion=0.2, max_train_samples=5)
    assert len(samples_of(sft_datasets(few, tokenizer)[0])) == 5
    records = [{"prompt": "P", "completion": f"{n}"} for n in range(3)]
    support.write_lines(Path(str(config.dataset_root)) / "validation.jsonl", records)
    rows, held = sft_datasets(replace(config, val_proportion=0.2), tokenizer)
    assert samples_of(rows) == everything
    assert samples_of(held) == sorted(map(by_hand, records))


def test_conversations_are_kept_whole(config: SftDataset, tokenizer: Tokenizer) -> None:
    """Those that make several samples are not on both sides."""
    root = Path(str(config.dataset_root))
    chats = []
    for n in range(30):
        turn = [
            {"role": "user", "content": f"<{n}>"},
            {"role": "assistant", "content": "A", "thinking": "T"},
        ]
        chats.append({"messages": turn * 3})
    support.write_lines(root / "training.jsonl", chats)
    chat = replace(config, form="chat", sequence_length=700, val_proportion=0.3)
    rows, held = sft_datasets(chat, tokenizer)

    def numbers(rows: Any) -> list[str]:
        texts = [bytes(t for t in ids if t < 256).decode() for ids, _ in samples_of(rows)]
        return sorted(text.split("<")[1].split(">")[0] for text in texts)

    training, validation = numbers(rows), numbers(held)
    assert len(validation) == 27
    assert len(training) == 63
    assert not set(training) & set(validation)


def test_inputs_of_all_kinds(
    config: SftDataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    root = Path(str(config.dataset_root))
    expected = sorted(map(by_hand, RECORDS))
    text = (root / "training.jsonl").read_bytes()
    (root / "training.jsonl").unlink()
    (root / "training.jsonl.zst").write_bytes(zstandard.compress(text))
    assert samples_of(sft_datasets(config, tokenizer)[0]) == expected
    (root / "training.jsonl.zst").unlink()
    parquet.write_table(Table.from_pylist(RECORDS), root / "training.parquet", row_group_size=13)
    assert samples_of(sft_datasets(config, tokenizer)[0]) == expected
    named = [{"question": r["prompt"], "answer": r["completion"], "n": 1} for r in RECORDS]
    file = support.write_lines(root / "mine.jsonl", named)
    keys = replace(config, dataset_root=str(file), prompt_key="question", completion_key="answer")
    assert samples_of(sft_datasets(keys, tokenizer)[0]) == expected


def test_a_file_that_was_packed_before(config: SftDataset, tokenizer: Tokenizer) -> None:
    root = Path(str(config.dataset_root))
    source, target = root / "training.jsonl", root / "training.parquet"
    job, shape = Job(Form(), tokenizer), Shape(LENGTH, 2)
    found = pack_files([source], target, shape, job)
    expected = sorted(map(by_hand, RECORDS))
    rows, held = sft_datasets(replace(config, val_proportion=0.25), tokenizer)
    assert held is not None
    assert len(rows) + len(held) == found["packs"]
    assert len(held) == round(found["packs"] / 4)
    assert not (root / "packed").exists()
    few = replace(config, val_proportion=0.25, max_train_samples=3)
    assert len(sft_datasets(few, tokenizer)[0]) == 3
    whole, _ = sft_datasets(config, tokenizer)
    learned = sum(int(whole[number]["loss_mask"].sum()) for number in range(len(whole)))
    assert learned == sum(int(sum(mask)) for _, mask in expected) == found["learned_tokens"]
    for wrong, message in [
        (
            {"sequence_length": 51},
            "was packed for a sequence length of 50; pack the data again, or",
        ),
        ({"pad_seq_to_mult": 5}, "padded to multiples of 2, where dataset.pad_seq_to_mult is 5"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            sft_datasets(replace(config, **wrong), tokenizer)
    with pytest.raises(UsageError, match=r"is packed, and dataset\.packing is off"):
        sft_datasets(replace(config, packing=False), tokenizer)
    files = tiny.write_tokenizer(root / "tokenizer")
    with pytest.raises(CheckpointError, match="was packed with another tokenizer than tiny"):
        sft_datasets(config, load_tokenizer(files, "tiny"))


def test_a_file_that_was_packed_in_another_form(config: SftDataset, tokenizer: Tokenizer) -> None:
    root = Path(str(config.dataset_root))
    named = [{"q": r["prompt"], "completion": r["completion"]} for r in RECORDS]
    source = support.write_lines(root / "named.jsonl", named)
    target = root / "named.parquet"
    job = Job(Form(prompt_key="q", loss_channels=("analysis", "final")), tokenizer)
    pack_files([source], target, Shape(LENGTH), job)
    packed = replace(config, dataset_root=str(target))
    wanted = sorted(map(by_hand, RECORDS))
    for right in ({}, {"prompt_key": "q"}, {"loss_channels": ("analysis", "final")}):
        assert samples_of(sft_datasets(replace(packed, **right), tokenizer)[0]) == wanted
    for wrong, message in [
        (
            {"form": "chat"},
            "form prompt_completion, where dataset.form is chat; pack the data again",
        ),
        (
            {"prompt_key": "x"},
            "prompt_key q, where dataset.prompt_key is x; .* dataset.prompt_key=q$",
        ),
        ({"loss_channels": ("final",)}, r"loss_channels \[analysis,final\], where .* is \[final\]"),
        ({"conversation_date": "2025-08-05"}, "conversation_date null, where .* is 2025-08-05"),
    ]:
        with pytest.raises(CheckpointError, match=f"named.parquet: was packed with {message}"):
            sft_datasets(replace(packed, **wrong), tokenizer)


def test_made_once(
    config: SftDataset, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cached = replace(config, path_to_cache=str(tmp_path / "cache" / "deep"))
    prepare(cached, tokenizer)
    (path,) = (tmp_path / "cache" / "deep").iterdir()
    before = path.stat().st_mtime_ns
    sft_datasets(cached, tokenizer)
    assert path.stat().st_mtime_ns == before
    prepare(replace(cached, sequence_length=60), tokenizer)  # another file beside it
    support.write_lines(Path(str(config.dataset_root)) / "training.jsonl", RECORDS[:7])
    rows, _ = sft_datasets(cached, tokenizer)
    assert samples_of(rows) == sorted(map(by_hand, RECORDS[:7]))
    assert len([*path.parent.iterdir()]) == 3


def _ask(config: SftDataset, folder: str, gate: Any, queue: Any) -> None:
    tokenizer = support.byte_tokenizer(Path(folder))
    gate.wait()
    rows, _ = sft_datasets(config, tokenizer)
    queue.put(samples_of(rows))


def test_several_processes_at_once(config: SftDataset, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, queue = context.Barrier(3), context.Queue()
    folders = [tmp_path / f"t{n}" for n in range(3)]
    for folder in folders:
        folder.mkdir()
    processes = [
        context.Process(target=_ask, args=(config, str(folder), gate, queue)) for folder in folders
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [sorted(map(by_hand, RECORDS))] * 3
    assert len([*(tmp_path / "data" / "packed").iterdir()]) == 1


def test_too_long(
    config: SftDataset, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = sft_datasets(replace(config, sequence_length=20), tokenizer)
    short = [sample for sample in map(by_hand, RECORDS) if len(sample[1]) <= 20]
    assert 5 < len(short) < 75
    assert samples_of(rows) == sorted(short)
    longest = max(len(by_hand(record)[1]) for record in RECORDS)
    assert (
        f"{80 - len(short)} of 80 samples are longer than the sequence length 20 and left out; the "
        f"longest takes {longest}"
    ) in caplog.text
    told = (
        "all 80 samples are longer than the sequence length 3, the shortest takes 4; say "
        "--sequence-length 4 or more (in a recipe dataset.sequence_length and model.seq_length)"
    )
    with pytest.raises(CheckpointError, match=re.escape(told)):
        sft_datasets(replace(config, sequence_length=3), tokenizer)


def test_one_side_is_too_long(
    config: SftDataset, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": "P", "completion": "c" * 90}, {"prompt": "P", "completion": "c"}]
    path = Path(str(config.dataset_root)) / "two.jsonl"
    two = replace(config, dataset_root=str(path), val_proportion=0.5)
    outcomes: list[Any] = []
    for kept in (records, records[::-1]):  # the long one is for validation, and for training
        support.write_lines(path, kept)
        try:
            rows, held = sft_datasets(two, tokenizer)
            outcomes.append((samples_of(rows), held))
        except CheckpointError as error:
            outcomes.append(str(error).partition("; ")[0])
    outcomes.sort(key=lambda one: isinstance(one, str))
    told = f"{path}: all 1 samples are longer than the sequence length 50, the shortest takes 91"
    assert outcomes == [([by_hand(records[1])], None), told]
    assert "all samples kept for validation are too long" in caplog.text


def test_what_ends_a_completion(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What generation ends on: <|endoftext|>, unless the checkpoint does not stop there."""
    assert end_of_completion(tokenizer) == tokenizer.id_of("<|endoftext|>") == 256
    stops = load_tokenizer(tiny.write_tokenizer(tmp_path / "a"), "tiny")
    assert end_of_completion(stops) == stops.id_of("<|return|>")
    backend = tiny.tiny_backend().to_str().replace("<|endoftext|>", "<|other|>")
    files = {"tokenizer.json": backend, "tokenizer_config.json": None}
    none = load_tokenizer(tiny.write_tokenizer(tmp_path / "b", **files), "tiny")
    with pytest.raises(ConfigError, match="no token that ends a text"):
        end_of_completion(none)


def test_tokens_do_not_merge_across_the_border(config: SftDataset, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "t"), "tiny")
    assert len(tokenizer.encode("final")) == 1
    records = [{"prompt": "fin", "completion": "al<|end|>"}]
    support.write_lines(Path(str(config.dataset_root)) / "training.jsonl", records)
    row = sft_datasets(config, tokenizer)[0][0]
    learned = row["labels"][row["loss_mask"] == 1].tolist()
    assert learned == [*tokenizer.encode("al"), *b"<|end|>", tokenizer.id_of("<|return|>")]


# Published data sets.

SQUAD = {
    "context": "Ada wrote it.",
    "question": "Who?",
    "answers": {"text": ["Ada", "She"], "answer_start": [0, 3]},
}
MATH = {
    "problem": "What is 2 + 3?",
    "generated_solution": "We add.\nSo it is $\\boxed{5}$.",
    "expected_answer": "5",
}


@pytest.mark.parametrize(
    ("preset", "record", "form", "expected"),
    [
        (
            "squad",
            SQUAD,
            "prompt_completion",
            "Context: Ada wrote it. Question: Who? Answer:« Ada<|endoftext|>»",
        ),
        ("squad", SQUAD, "chat", "Answer:<|end|><|start|>assistant«<|channel|>final<|message|>Ada"),
        (
            "openmathinstruct2_thinking",
            MATH,
            "chat",
            "«<|channel|>analysis<|message|>We add.\nSo it is<|end|>"
            + "<|start|>assistant<|channel|>final<|message|>#### 5<|return|>»",
        ),
        (
            "openmathinstruct2_thinking",
            {**MATH, "generated_solution": "5"},
            "prompt_completion",
            "Problem: What is 2 + 3? Solution:« 5\n#### 5<|endoftext|>»",
        ),
    ],
)
def test_presets(
    preset: str, record: dict[str, Any], form: Any, expected: str, tokenizer: Tokenizer
) -> None:
    (text,) = support.shown(record, Form(form, preset=preset), tokenizer)
    assert expected in text


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"question": "Who?"}, r"has no field 'context', only 'question'; is it of squad\?"),
        ({**SQUAD, "answers": {"text": []}}, r"has no answer under answers.text\[0\]; is it of"),
        ({**SQUAD, "answers": "Ada"}, r"has no answer under answers.text\[0\]; is it of squad"),
    ],
)
def test_records_of_something_else(
    record: dict[str, Any], sentence: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(BadRecordError, match=sentence):
        support.shown(record, Form(preset="squad"), tokenizer)


class _Split:
    """What our code asks of a data set of ``datasets``."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records

    def to_parquet(self, path: str) -> None:
        parquet.write_table(Table.from_pylist(self._records), path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """In place of ``datasets``, which tests do not install: name, subset, split -> records."""
    there: dict[Any, Any] = {"asked": []}

    def load_dataset(name: str, subset: str | None, split: str) -> _Split:
        there["asked"].append((name, subset, split))
        if (name, subset, split) not in there:
            raise ValueError(f'Unknown split "{split}".')
        return _Split(there[name, subset, split])

    module = SimpleNamespace(
        load_dataset=load_dataset, __spec__=SimpleNamespace(name="datasets"), __path__=[]
    )
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[misc]
    return there


def test_of_the_hub(hub: dict[Any, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    hub["rajpurkar/squad", None, "train"] = [SQUAD, {**SQUAD, "question": "Who else?"}]
    hub["rajpurkar/squad", None, "validation"] = [{**SQUAD, "question": "Really?"}]
    squad = SftDataset(sequence_length=80, path_to_cache=str(tmp_path / "cache"))
    rows, held = sft_datasets(squad, tokenizer)
    assert held is not None
    texts = [bytes(t for t in ids if t < 256).decode() for ids, _ in samples_of(rows)]
    assert texts == [
        f"Context: Ada wrote it. Question: {q} Answer: Ada" for q in ("Who else?", "Who?")
    ]
    assert b"Really?" in bytes(t for t in samples_of(held)[0][0] if t < 256)
    sft_datasets(squad, tokenizer)
    assert len(hub["asked"]) == 2  # once for each split

    hub["me/mine", "main", "train"] = RECORDS
    mine = replace(squad, dataset_name="me/mine", dataset_subset="main", val_proportion=0.1)
    rows, held = sft_datasets(mine, tokenizer)
    assert held is not None
    assert sorted([*samples_of(rows), *samples_of(held)]) == sorted(map(by_hand, RECORDS))
    with pytest.raises(ConfigError, match="cannot read its split 'dev'"):
        sft_datasets(replace(mine, dataset_split="dev"), tokenizer)
    assert PRESETS["openmathinstruct2_thinking"].split == "train_1M"


def test_without_datasets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    if "datasets" in sys.modules:
        pytest.skip("it is installed")
    config = SftDataset(dataset_name="no/where", path_to_cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'gptoss-convert\[sft\]'"):
        sft_datasets(config, tokenizer)


# What is wrong.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"training\.jsonl: line 5 is no JSON .*; mend or remove that line"),
        ("[" * 100_000, r"training\.jsonl: line 5 is no JSON"),
        ("[1]", "line 5 is no JSON object"),
        ('{"prompt": "x"}', "line 5 has no field 'completion', only 'prompt'; name the fields"),
        ("{}", "line 5 has no field 'prompt', only nothing"),
        (
            '{"prompt": "x", "completion": ""}',
            "line 5 has an empty 'completion', so nothing to learn",
        ),
        ('{"prompt": "x", "completion": 3}', "line 5 has a 'completion' that is no text"),
        ('{"prompt": "\\ud800", "completion": "y"}', "line 5 has a 'prompt' with half a surrogate"),
    ],
)
def test_bad_lines(
    line: str,
    message: str,
    config: SftDataset,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 60)  # the line is in another unit than the first one
    root = Path(str(config.dataset_root))
    good = [json.dumps(record) for record in RECORDS[:3]]
    (root / "training.jsonl").write_text("\n".join([*good, "", line, good[0]]))
    with pytest.raises(CheckpointError, match=message):
        sft_datasets(config, tokenizer)
    assert [*(root / "packed").iterdir()] == []


def test_damaged_parquet(config: SftDataset, tokenizer: Tokenizer) -> None:
    path = Path(str(config.dataset_root)) / "mine.parquet"
    mine = replace(config, dataset_root=str(path))
    parquet.write_table(Table.from_pylist(RECORDS), path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"mine\.parquet: cannot be read from row 0 on"):
        sft_datasets(mine, tokenizer)
    path.write_bytes(bytes(data[:300]))
    with pytest.raises(CheckpointError, match=r"mine\.parquet: is no Parquet file"):
        sft_datasets(mine, tokenizer)
    parquet.write_table(Table.from_pylist([{"prompt": "x", "completion": None}]), path)
    with pytest.raises(CheckpointError, match=r"row 0 has a 'completion' that is no text"):
        sft_datasets(mine, tokenizer)


def test_bad_places(config: SftDataset, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    for root, error, message in [
        (
            "gone",
            UsageError,
            "is not there; dataset.dataset_root names a folder with training.jsonl",
        ),
        ("none", UsageError, "has no training.jsonl or training.parquet, only nothing"),
        ("x.txt", UsageError, "ends in none of .parquet, .jsonl, .json, .jsonl.zst"),
        ("empty.jsonl", CheckpointError, "no record in it; write one a line"),
    ]:
        with pytest.raises(error, match=message):
            sft_datasets(replace(config, dataset_root=str(tmp_path / root)), tokenizer)
    with pytest.raises(UsageError, match=r"neither dataset\.dataset_root nor"):
        sft_datasets(replace(config, dataset_root=None, dataset_name=None), tokenizer)
    file = replace(config, path_to_cache=str(tmp_path / "x.txt" / "cache"))
    with pytest.raises(ResourceError, match=r"name another folder by dataset\.path_to_cache"):
        sft_datasets(file, tokenizer)
    chats = [{"messages": [{"role": "assistant", "content": "x"}]}]
    path = support.write_lines(tmp_path / "chats.jsonl", chats)
    chat = replace(config, form="chat", loss_channels=("analysis",), dataset_root=str(path))
    with pytest.raises(CheckpointError, match="has 1 records, and nothing in them is learned"):
        sft_datasets(chat, tokenizer)


# The command.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found: Path = support.write_lines(tmp_path / "records.jsonl", RECORDS)
    return found


def test_command(source: Path, tmp_path: Path, invoke: Any) -> None:
    command = ["data", "pack", "--input", source, "--output", tmp_path / "packs", "--byte-level"]
    done = invoke(*command, "--sequence-length", LENGTH, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    places = [len(by_hand(record)[1]) for record in RECORDS]
    learned = sum(int(sum(by_hand(record)[1])) for record in RECORDS)
    expected = {
        "schema": "gptoss-convert.pack/1",
        "path": str(tmp_path / "packs.parquet"),
        "sequence_length": LENGTH,
        "files": 1,
        "records": 80,
        "skipped": 0,
        "samples": 80,
        "dropped": 0,
        "tokens": sum(places),
        "learned_tokens": learned,
        "longest": max(places),
    }
    assert {name: found[name] for name in expected} == expected
    table = parquet.read_table(tmp_path / "packs.parquet")
    assert found["packs"] == table.num_rows
    assert found["fill"] == pytest.approx(sum(places) / (table.num_rows * LENGTH), abs=1e-6)
    note = json.loads(table.schema.metadata[b"gptoss-convert"])
    assert note["sequence_length"] == LENGTH
    assert note["form"]["form"] == "prompt_completion"
    assert note["report"]["packs"] == found["packs"]

    done = invoke(*command, "--sequence-length", LENGTH)
    assert done.returncode == 2
    assert "is there already; say --overwrite" in done.stderr
    done = invoke(*command, "--sequence-length", 20, "--overwrite")
    assert done.returncode == 0
    assert "left out: " in done.stdout
    assert "% full: " in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packs.parquet", "records.jsonl"]


def test_command_refuses(source: Path, tmp_path: Path, invoke: Any) -> None:
    base = ["data", "pack", "--input", source, "--output", tmp_path / "packs"]
    good = [*base, "--byte-level", "--sequence-length", 50]
    (tmp_path / "folder.parquet").mkdir()
    for command, code, message in [
        ([*base, "--sequence-length", 50], 2, "name a tokenizer"),
        ([*good, "--input", tmp_path / "gone.jsonl"], 2, "gone.jsonl: is not there"),
        ([*good, "--output", tmp_path / "folder"], 2, "is a folder; name a file"),
        ([*good, "--output", source / "x"], 1, "x.parquet.parts: Not a directory; check the path"),
        ([*good, "--pad-to-multiple", 7], 2, "50 is no multiple of 7"),
        ([*good, "--form", "chat", "--conversation-date", "today"], 2, "'today' is no date"),
        ([*good, "--prompt-key", "q"], 1, "line 1 has no field 'q', only 'prompt', 'completion'"),
        ([*good, "--form", "chat"], 1, "line 1 has no list of messages under 'messages'"),
        (
            [*good, "--sequence-length", 2],
            1,
            "all 80 samples are longer than the sequence length 2, the shortest takes 4; say --seq",
        ),
    ]:
        done = invoke(*command)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "packs.parquet").exists()


@pytest.mark.slow
def test_workers_and_kills_change_no_byte(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    job, shape = Job(Form(), tokenizer), Shape(LENGTH)
    pack_files([source], tmp_path / "one.parquet", shape, job)
    expected = (tmp_path / "one.parquet").read_bytes()
    pack_files([source], tmp_path / "three.parquet", shape, job, workers=3)
    assert (tmp_path / "three.parquet").read_bytes() == expected

    code = f"""
import sys, time
from pathlib import Path
sys.path[:0] = {[str(Path(p)) for p in sys.path if p]!r}
from gptoss_plugins.data import units
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.making import Shape
from gptoss_plugins.data.sft.offline import pack_files
from gptoss_plugins.data.sft.tokenizing import Job
from gptoss_plugins.infer.tokenizer import load_tokenizer
units.UNIT_BYTES = 700
folder, source, target = map(Path, sys.argv[1:])
job = Job(Form(), load_tokenizer({{p.name: p for p in folder.iterdir()}}, "bytes"))
pack_files([source], target, Shape({LENGTH}), job, progress=lambda _: time.sleep(0.2))
"""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    support.byte_tokenizer(folder)
    target = tmp_path / "killed.parquet"
    parts = tmp_path / "killed.parquet.parts"
    words = [sys.executable, "-c", code, str(folder), str(source), str(target)]
    running = subprocess.Popen(words)
    while not (parts / "000002.npz").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not target.exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    again: list[int] = []
    pack_files([source], target, shape, job, progress=again.append)
    assert target.read_bytes() == expected
    assert again[0] >= sum(700 for _ in before) - 700  # what was done is not done again
    assert not parts.exists()


def test_a_crash_leaves_the_last_file(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packs.parquet"
    pack_files([source], target, Shape(LENGTH), Job(Form(), tokenizer))
    before = target.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        pack_files([source], target, Shape(60), Job(Form(), tokenizer), overwrite=True)
    assert target.read_bytes() == before


def test_rows_in_other_processes(config: SftDataset, tokenizer: Tokenizer) -> None:
    """As a DataLoader's workers, which get the dataset pickled or forked."""
    rows, _ = sft_datasets(config, tokenizer)
    direct = [rows[number]["tokens"].tolist() for number in range(5)]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=1, sampler=[*range(5)], num_workers=1, multiprocessing_context="spawn"
    )
    assert [batch["tokens"][0].tolist() for batch in loader] == direct
    assert np.array(direct).shape == (5, LENGTH)
