"""Checkpoints of every form, damaged by hand and at random: a sentence or a good run, and no more."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ITER = "iter_0000000"
INDEX = "model.safetensors.index.json"
TRACKER = "latest_checkpointed_iteration.txt"
LAUGHS = "\n".join(
    f"  {name}: &{name} [{', '.join(['*' + before] * 9)}]"
    for before, name in itertools.pairwise("abcdefghijkl")
)
HUGE = 10**400  # no float
LONG = "GPTOSS_FUZZ_SECONDS" in os.environ


def shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the facts of a shard's first tensor."""

    def damage(folder: Path) -> None:
        data = shard(folder).read_bytes()
        end = 8 + struct.unpack_from("<Q", data)[0]
        facts = json.loads(data[8:end])
        change(next(fact for name, fact in facts.items() if name != "__metadata__"))
        text = json.dumps(facts).encode()
        shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return damage


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_bytes())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edited(config_of(folder), lambda c: c.update(fields))(folder)


def config_of(folder: Path) -> str:
    return "config.json" if (folder / "config.json").exists() else f"{ITER}/huggingface/config.json"


def run_config(text: str) -> Callable[[Path], None]:
    """Where nothing else tells the model."""

    def damage(folder: Path) -> None:
        (folder / config_of(folder)).unlink()
        (folder / ITER / "common.pt").unlink()
        (folder / ITER / "run_config.yaml").write_text(text)

    return damage


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file or folder."""

    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return damage


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)


def loop(path: Path) -> None:
    path.symlink_to(path)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def long(path: Path) -> None:
    """A terabyte, none of it on disk."""
    path.touch()
    os.truncate(path, 1 << 40)


ODD = {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": loop, "zeros": link("/dev/zero"),
       "elsewhere": link("/etc/passwd"), "long": long, "empty": Path.touch}  # fmt: skip
FIRST_SHARD = "model-00000-of-00002.safetensors"
FILES = {
    "hf": ["config.json", INDEX, FIRST_SHARD, "tokenizer.json"],
    "torch_dist": [TRACKER, *(f"{ITER}/{name}" for name in (
        ".metadata", "metadata.json", "common.pt", "run_config.yaml", "__0_0.distcp",
        "huggingface/config.json", "tokenizer/tokenizer.json", "quantization/mxfp4.safetensors"))],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "torch": [TRACKER, ITER, f"{ITER}/mp_rank_01", f"{ITER}/mp_rank_01/model_optim_rng.pt"],
}  # fmt: skip


def odd_files() -> Iterator[tuple[str, str, str]]:
    """Each kind for every file; three for each, all in turn, where there is little time."""
    kinds = itertools.cycle(ODD)
    for form, names in FILES.items():
        for name in names:
            yield from (
                (form, name, kind) for kind in (ODD if LONG else itertools.islice(kinds, 3))
            )


HEADERS = {
    "negative": {"shape": [-1, 64]},
    "huge": {"shape": [10**30]},
    "nothing, hugely": {"shape": [0, 10**30], "data_offsets": [0, 0]},
    "many dims": {"shape": [1] * 100_000},
    "no list": {"shape": "ab"},
    "NaN": {"shape": [float("nan")]},
    "before the data": {"data_offsets": [-8, 8]},
    "past the file": {"data_offsets": [2**64, 2**64 + 10]},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "a type that is a list": {"dtype": []},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "a trillion layers": {"num_hidden_layers": 10**12},
    "a million layers": {"num_hidden_layers": 10**6, "layer_types": ["full_attention"] * 10**6},
    "a trillion experts": {"num_local_experts": 10**12},
    "a trillion heads": {"num_attention_heads": 10**12, "num_key_value_heads": 10**12},
    "an endless vocabulary": {"vocab_size": HUGE},
    "an endless window": {"sliding_window": HUGE},
    "an endless base": {"rope_theta": HUGE},
    "an infinite base": {"rope_theta": float("inf")},
    "an epsilon that is none": {"rms_norm_eps": float("nan")},
    "an endless limit": {"swiglu_limit": HUGE},
    "an endless factor": {"rope_scaling": {
        "rope_type": "yarn", "factor": HUGE, "original_max_position_embeddings": 4096}},
    "a rope of text": {"rope_scaling": {
        "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}},
    "a beta of text": {"rope_scaling": {
        "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 4, "beta_fast": "x"}},
    "ropes in a list": {"rope_scaling": []},
    "an architecture that draws": {"architectures": ["\x1b[2J\nerror: fine"]},
    "a method that is a list": {"quantization_config": {"quant_method": ["mxfp4"]}},
    "code to fetch": {"auto_map": {"AutoConfig": "evil.Evil"}},
}  # fmt: skip
RUN_CONFIGS = {
    "a call": f"model: !!python/object/apply:os.mknod [{'trace'!r}]\n",
    "a billion laughs": f"model:\n  a: &a [x, x, x]\n{LAUGHS}\n",
    "merged laughs": "a: &a {k: 1}\nb: &b {<<: [*a, *a, *a]}\nmodel: {<<: [*b, *b, *b]}\n",
    "depth": "model: " + "[" * 100_000,
    "itself": "model: &a {x: *a, num_layers: [*a]}\n",
    "a date that is none": "model: {num_layers: 9999-99-99}\n",
    "a number of many digits": "model: {num_layers: " + "9" * 6000 + "}\n",
    "a key that is a list": "model: {? [1] : 2}\n",
    "no mapping": "[1]\n",
}
TRACKERS = {
    "nonsense": b"hello",
    "nothing": b"",
    "digits": b"9" * 3000,
    "a path": b"../../etc",
    "zeros": b"\0\0",
    "other digits": "\u0663".encode(),
    "bytes": bytes(range(128, 256)),
}
CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{f"header: {k}": ("hf", header(lambda h, v=v: h.update(v))) for k, v in HEADERS.items()},
    **{f"config: {k}": ("hf", config(**v)) for k, v in CONFIGS.items()},
    **{f"Megatron's config: {k}": ("torch_dist", config(**v)) for k, v in CONFIGS.items()},
    **{f"run config: {k}": ("torch_dist", run_config(v)) for k, v in RUN_CONFIGS.items()},
    **{f"tracker: {k}": ("torch", written(TRACKER, v)) for k, v in TRACKERS.items()},
    **{f"{name}: {kind}": (form, replaced(name, ODD[kind])) for form, name, kind in odd_files()},
    "header as long as can be": ("hf", written(FIRST_SHARD, b"\xff" * 64)),
    "config in depth": ("hf", written("config.json", b'{"a":' * 200_000)),
    "config with many names twice": (
        "hf", written("config.json", b"{" + b",".join(b'"k%d":1' % i for i in range(10**5)) * 2)),
    "config with a number of many digits": (
        "hf", written("config.json", b'{"a":' + b"9" * 10**6 + b"}")),
    "index with many files": ("hf", edited(INDEX, lambda i: i["weight_map"].update(
        {f"n{k}": f"f{k}" for k in range(10**5)}))),
    "index with a device's name": ("hf", edited(INDEX, lambda i: i["weight_map"].update(
        {name: "\0" for name in list(i["weight_map"])[:1]}))),
    "a tokenizer's name in other bytes": (
        "hf", lambda f: (Path(os.fsdecode(os.fsencode(f) + b"/tokenizer\xff.json"))).touch()),
    "a tokenizer's name that draws": ("hf", lambda f: (f / "tokenizer\n\x1b[2J[bold].json").touch()),
    "a tokenizer folder that is all files": (
        "torch_dist", replaced(f"{ITER}/tokenizer", link("/proc"))),
}  # fmt: skip


@pytest.mark.parametrize(  # a third of them in CI
    "name",
    [pytest.param(n, marks=pytest.mark.slow if i % 3 else ()) for i, n in enumerate(CASES)],
)
def test_damaged_by_hand(name: str, forms: dict[str, Path], tmp_path: Path, attempt: Any) -> None:
    form, damage = CASES[name]
    source = Path(shutil.copytree(forms[form], tmp_path / "source"))
    damage(source)
    attempt(form, source, turn=None if LONG else list(CASES).index(name))
    assert not (tmp_path / "trace").exists()
    assert not Path("trace").exists()


@pytest.mark.parametrize(("form", "name"), [
    ("hf", "tokenizer.json"), ("hf", "config.json"), ("hf", FIRST_SHARD),
    ("torch_dist", f"{ITER}/tokenizer/tokenizer.json"), ("torch_dist", f"{ITER}/__0_0.distcp"),
    ("torch_dist", f"{ITER}/common.pt"), ("torch_dist", ITER),
    ("torch", f"{ITER}/mp_rank_01/model_optim_rng.pt"), ("torch", f"{ITER}/mp_rank_01"),
])  # fmt: skip
def test_links_out_of_the_folder(
    form: str, name: str, forms: dict[str, Path], tmp_path: Path, attempt: Any
) -> None:
    """Though what they lead to would do; inside of the folder they are as good as files."""
    source = Path(shutil.copytree(forms[form], tmp_path / "source"))
    (source / name).rename(source / "moved")
    (source / name).symlink_to(source / "moved")
    assert all(ended.code == 0 for ended in attempt(form, source, lambda c: c[0] == "inspect"))
    (source / "moved").rename(tmp_path / "moved")
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "moved")
    for ended in attempt(form, source, lambda c: "--json" in c):
        assert ended.code == 1
        assert f"{source / name}: is a link to {tmp_path / 'moved'}, outside" in ended.stderr + (
            ended.stdout
        ) or name.endswith("mp_rank_01")


def test_links_to_the_hub_s_cache(forms: dict[str, Path], tmp_path: Path, attempt: Any) -> None:
    """A model's folder in huggingface_hub's cache is all links, to files that the model's names."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(forms["hf"].iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert all(ended.code == 0 for ended in attempt("hf", snapshot, lambda c: c[0] == "inspect"))


# ---- at random


def files_of(folder: Path) -> list[str]:
    """Those that decide something, small ones first: a shrunk example is then one of them."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [str(p.relative_to(folder)) for p in sorted(found, key=lambda p: (p.stat().st_size, p))]


POSITION = st.floats(0, 1, exclude_max=True)
NUMBERS = st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63])
TOKENS = st.sampled_from([
    b"-1", b"NaN", b"1e999", b"9" * 5000, b"null", b"{}", b"[]", b'"\\ud800"', b'"../x"', b"\xff",
    b"[" * 2000, b"cos\nsystem\n", b"\x85" * 2000, b"PK\5\6", b"\0" * 64, b"",
])  # fmt: skip
CHANGES = st.one_of(
    st.tuples(st.just("flip"), POSITION, st.integers(0, 7)),
    st.tuples(st.just("cut"), POSITION),
    st.tuples(st.just("number"), POSITION, NUMBERS, st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("token"), POSITION, TOKENS, st.integers(0, 16)),
    st.tuples(st.just("digits"), POSITION, TOKENS),
    st.tuples(st.just("move"), POSITION, POSITION, st.integers(1, 64)),
)


def changed(data: bytes, kind: str, *how: Any) -> bytes:
    """A file's bytes after a change; most of a large file is numbers, where nothing shows."""
    reach = len(data) if how[0] < 0.5 else min(len(data), 2000)
    at = (
        int(how[0] * 2 % 1 * reach)
        if how[0] < 0.75
        else len(data) - 1 - int(how[0] * 2 % 1 * reach)
    )
    at = max(0, at)
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << how[1]]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "number":
        return data[:at] + how[1].to_bytes(8, "little")[: how[2]] + data[at + how[2] :]
    if kind == "token":
        return data[:at] + how[1] + data[at + how[2] :]
    if kind == "digits":  # the next number that is written out
        start = next((n for n in range(at, len(data)) if 48 <= data[n] < 58), len(data))
        end = next((n for n in range(start, len(data)) if not 48 <= data[n] < 58), len(data))
        return data[:start] + how[1] + data[end:]
    if kind == "move":
        other = int(how[1] * len(data))
        return data[:at] + data[other : other + how[2]] + data[at + how[2] :]
    return data


@pytest.mark.parametrize("form", ["hf", "mxfp4", "torch_dist", "torch", "peft", "adapter"])
def test_damaged_at_random(
    form: str, forms: dict[str, Path], tmp_path: Path, attempt: Any, fuzz: Any
) -> None:
    names, turns = files_of(forms[form]), itertools.count()

    @given(st.lists(st.tuples(POSITION, CHANGES), min_size=1, max_size=3))
    def try_one(changes: list[tuple[float, tuple[Any, ...]]]) -> None:
        source = tmp_path / "source"
        shutil.copytree(forms[form], source)
        try:
            for which, change in changes:
                path = source / names[int(which * len(names))]
                path.write_bytes(changed(path.read_bytes(), *change))
            attempt(form, source, turn=next(turns))
        finally:
            shutil.rmtree(source)

    fuzz(try_one, 8)
