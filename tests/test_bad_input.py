"""What a user may get wrong: one clear sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_plugins.megatron import metadata
from gptoss_plugins.megatron.source import TorchDistSource

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in range(3)]
LAYER_1 = "model.layers.1."
Tree = Callable[[Path], dict[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


# ---- what is expected of every refusal


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    """``code``, and one sentence (or a list of problems) on stderr that has each of ``says``."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    first, *rest = done.stderr.rstrip("\n").split("\n")
    if rest:
        shown, more = rest, 0
        if found := re.fullmatch(r"  \.\.\. and (\d+) more", rest[-1]):
            shown, more = rest[:-1], int(found[1])
            assert len(shown) == 20
        assert first.endswith(f"{len(shown) + more} problems"), done.stderr
        assert all(line.startswith("  ") and "; " in line for line in shown), done.stderr
    else:
        assert "; " in first, f"does not say what to do: {first}"
    for text in says:
        assert text in done.stderr, done.stderr


def assert_usage(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 2 and click's own explanation."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr


@pytest.fixture
def unchanged(tmp_path: Path, tree: Tree) -> Iterator[Callable[[], None]]:
    """Call it once the input stands; from then on nothing under tmp_path may come, go or change."""
    before: list[dict[str, str]] = []
    yield lambda: before.append(tree(tmp_path))
    assert before, "the test never said when its input stood"
    assert tree(tmp_path) == before[0]


# ---- ways to damage a Hugging Face folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], object], shard: str = SHARDS[1]
) -> None:
    """Change one shard's tensors; the index follows."""
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard)

    def follow(index: dict[str, Any]) -> None:
        kept = {name: file for name, file in index["weight_map"].items() if file != shard}
        index["weight_map"] = kept | dict.fromkeys(tensors, shard)

    edit_json(folder / INDEX, follow)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard's header and leave its data alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut(path: Path, size: int) -> None:
    """Keep ``size`` bytes; a negative size counts from the end."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def set_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: change(t[name])}))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def place(name: str, file: str) -> Callable[[Path], None]:
    """Make the index say that a tensor is in ``file``."""
    return lambda folder: edit_json(folder / INDEX, lambda i: i["weight_map"].update({name: file}))


def twice(file: str, key: str) -> Callable[[Path], None]:
    """Repeat a key at the top of a JSON file."""

    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("{", f'{{"{key}": {{}}, ', 1))

    return damage


def rename_raw(new: str) -> Callable[[Path], None]:
    """A name that safetensors itself would not write."""

    def damage(folder: Path) -> None:
        edit_header(folder / SHARDS[1], lambda h: h.update({new: h.pop(Q1)}))
        edit_json(folder / INDEX, lambda i: i["weight_map"].update({new: i["weight_map"].pop(Q1)}))

    return damage


def link_to_nothing(path: Path) -> None:
    """As a hub cache that was cleaned up leaves it."""
    path.unlink()
    path.symlink_to("../../blobs/0123456789abcdef")


def twice_in_header(folder: Path) -> None:
    path = folder / SHARDS[1]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    name = list(json.loads(header))[-1]
    fact = json.dumps(json.loads(header)[name])
    header = header.replace(b"{", f'{{"{name}": {fact}, '.encode(), 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def both_forms(folder: Path) -> None:
    shutil.copy(folder / SHARDS[0], folder / "model.safetensors")


def in_two_shards(folder: Path) -> None:
    """A tensor stands in two shards, of which the index knows one."""
    name, tensor = next(iter(load_file(folder / SHARDS[0]).items()))
    tensors = load_file(folder / SHARDS[2])
    save_file(tensors | {name: tensor}, folder / SHARDS[2])


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(fields))


def without(*fields: str) -> Callable[[Path], None]:
    def drop(content: dict[str, Any]) -> None:
        for name in fields:
            del content[name]

    return lambda folder: edit_json(folder / "config.json", drop)


def without_rope(field: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda c: c["rope_scaling"].__delitem__(field)
    )


@dataclass(frozen=True)
class Bad:
    """One thing that is wrong with a folder, and what the message must name.

    ``plan`` is False if headers do not show it, and None if planning may find it or not.
    """

    id: str
    damage: Callable[[Path], object]
    says: tuple[str, ...]
    plan: bool | None = True


def ids(cases: list[Bad]) -> list[Any]:
    return [pytest.param(case, id=case.id.replace(" ", "-")) for case in cases]


Q1, ROUTER_1 = LAYER_1 + "self_attn.q_proj.weight", LAYER_1 + "mlp.router.weight"
DOWN_1 = LAYER_1 + "mlp.experts.down_proj"
BAD_HF = [
    Bad("missing shard", lambda f: (f / SHARDS[1]).unlink(), (SHARDS[1], INDEX, "fetch it")),
    Bad("shard a dangling link", lambda f: link_to_nothing(f / SHARDS[1]), (SHARDS[1], "fetch it")),
    Bad("empty shard", lambda f: (f / SHARDS[1]).write_bytes(b""), (SHARDS[1], "0 bytes")),
    Bad("shard cut in its length", lambda f: cut(f / SHARDS[1], 5), (SHARDS[1], "5 bytes")),
    Bad("shard cut in its header", lambda f: cut(f / SHARDS[1], 100), (SHARDS[1], "cut short")),
    Bad("shard cut in its data", lambda f: cut(f / SHARDS[1], -1), (SHARDS[1], "cut short"), False),
    Bad(
        "shard cut after its header",
        lambda f: cut(
            f / SHARDS[2], 8 + struct.unpack("<Q", (f / SHARDS[2]).read_bytes()[:8])[0]
        ),
        (SHARDS[2], "cut short", "fetch it again"),
        False,
    ),
    Bad(
        "bytes after the data",
        lambda f: (f / SHARDS[1]).write_bytes((f / SHARDS[1]).read_bytes() + b"\0"),
        (SHARDS[1], "has bytes its header omits"),
        False,
    ),
    Bad(
        "a web page instead of a shard",
        lambda f: (f / SHARDS[1]).write_bytes(b"<!DOCTYPE html><html>" + b" " * 999),
        (SHARDS[1], "no safetensors file"),
    ),
    Bad(
        "header no JSON",
        lambda f: (f / SHARDS[1]).write_bytes(struct.pack("<Q", 9) + b"{'a': 1} " + b" " * 99),
        (SHARDS[1], "header is damaged"),
    ),
    Bad(
        "header with a hole",
        lambda f: edit_header(
            f / SHARDS[1],
            lambda h: [
                v.update(data_offsets=[n + 2 for n in v["data_offsets"]])
                for k, v in h.items()
                if k != "__metadata__"
            ],
        ),
        (SHARDS[1], "header is damaged"),
    ),
    Bad(
        "header with a size that its bytes cannot hold",
        lambda f: edit_header(f / SHARDS[1], lambda h: h[ROUTER_1].update(shape=[6, 64])),
        (SHARDS[1], ROUTER_1, "header is damaged"),
    ),
    Bad(
        "header with an unknown type",
        lambda f: edit_header(f / SHARDS[1], lambda h: h[ROUTER_1].update(dtype="Q7")),
        (SHARDS[1], ROUTER_1, "Q7"),
    ),
    Bad("header with a name twice", twice_in_header, (SHARDS[1], "stands twice")),
    Bad("tensor renamed", rename(Q1, Q1 + "s"), (Q1, "rename it", "2 problems")),
    Bad("layer renamed", rename(Q1, Q1.replace("1", "7", 1)), (Q1, "is missing", "layers.7")),
    Bad("name with a line break", rename_raw("x\nerror: fine\x1b[2J"), (Q1, "x\\nerror: fine\\x1b")),
    Bad("name with half a letter", rename_raw("x\ud800"), (Q1, "x\\ud800")),
    Bad("tensor missing", lambda f: edit_tensors(f, lambda t: t.pop(Q1)), (Q1, "is missing")),
    Bad(
        "one too many",
        lambda f: edit_tensors(f, lambda t: t.update({"model.extra": torch.ones(3)})),
        ("model.extra", "no rule maps it", "remove it"),
    ),
    Bad(
        "one layer too many",
        lambda f: edit_tensors(
            f, lambda t: t.update({Q1.replace("1", "3", 1): t[Q1].clone()})
        ),
        ("model.layers.3.self_attn.q_proj.weight", "no rule maps it"),
    ),
    Bad(
        "wrong shape",
        set_tensor(ROUTER_1, lambda t: t[:4].clone()),
        (ROUTER_1, "[4, 64]", "[5, 64]"),
    ),
    Bad(
        "transposed",
        set_tensor(DOWN_1, lambda t: t.mT.contiguous()),
        (DOWN_1, "[5, 64, 96]", "[5, 96, 64]"),
    ),
    Bad("wrong rank", set_tensor(ROUTER_1, lambda t: t.flatten()), (ROUTER_1, "[320]")),
    Bad("integers", set_tensor(ROUTER_1, lambda t: t.to(torch.int16)), (ROUTER_1, "I16", "BF16")),
    Bad("another float", set_tensor(ROUTER_1, lambda t: t.float()), (ROUTER_1, "F32", "BF16")),
    Bad("in two shards", in_two_shards, (SHARDS[0], SHARDS[2], "fetch both again")),
    Bad("index naming an absent file", place(Q1, "model-9.safetensors"), ("model-9.safetensors",)),
    Bad("index naming another shard", place(Q1, SHARDS[2]), (Q1, SHARDS[1], SHARDS[2])),
    Bad("index with a parent path", place(Q1, "../x.safetensors"), (INDEX, "../x.safetensors")),
    Bad("index with a root path", place(Q1, "/etc/passwd"), (INDEX, "/etc/passwd")),
    Bad("index with a number", place(Q1, 3), (INDEX, Q1)),  # type: ignore[arg-type]
    Bad("index with a name twice", twice(INDEX, "weight_map"), (INDEX, "'weight_map'", "twice")),
    Bad("index no JSON", lambda f: (f / INDEX).write_text("{"), (INDEX, "no valid JSON")),
    Bad("index a list", lambda f: (f / INDEX).write_text("[]"), (INDEX, "not a JSON object")),
    Bad("index empty", lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight_map")),
    Bad("index lacking a tensor", lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop(Q1)),
        (Q1, SHARDS[1], INDEX)),
    Bad("index naming no such tensor", place("model.ghost", SHARDS[1]), ("model.ghost", SHARDS[1])),
    Bad("no index", lambda f: (f / INDEX).unlink(), (INDEX, "model.safetensors")),
    Bad("index and a single file", both_forms, (INDEX, "model.safetensors", "remove the stale one")),
    Bad("config a folder", lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ("config.json",)),
    Bad("no config", lambda f: (f / "config.json").unlink(), ("config.json", "fetch")),
    Bad("config no JSON", lambda f: (f / "config.json").write_text("{,}"), ("config.json", "JSON")),
    Bad("config binary", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"),
        ("config.json", "JSON")),
    Bad("config empty", lambda f: (f / "config.json").write_bytes(b""), ("config.json", "JSON")),
    Bad("config a list", lambda f: (f / "config.json").write_text("[1]"),
        ("config.json", "not a JSON object")),
    Bad("config with a field twice", twice("config.json", "rope_scaling"),
        ("config.json", "'rope_scaling'", "twice")),
    Bad("config nested too deep", lambda f: (f / "config.json").write_text("[" * 100_000),
        ("config.json", "JSON")),
    Bad("undeclared mxfp4", lambda f: edit_tensors(
        f, lambda t: t.update({DOWN_1 + "_blocks": torch.zeros(5, 64, 3, 16, dtype=torch.uint8),
                               DOWN_1 + "_scales": torch.zeros(5, 64, 3, dtype=torch.uint8)})),
        (DOWN_1 + "_blocks", "mxfp4", "--codec mxfp4")),
    Bad("mxfp4 declared, weights plain", config(quantization_config={"quant_method": "mxfp4"}),
        ("config.json", "mxfp4", "_blocks")),
    Bad("unknown quantization", config(quantization_config={"quant_method": "gptq"}),
        ("'gptq'", "plugin")),
    Bad("quantization no object", config(quantization_config="mxfp4"), ("quantization_config",)),
    Bad("another architecture", config(architectures=["LlamaForCausalLM"]), ("LlamaForCausalLM",)),
    Bad("architectures a number", config(architectures=3), ("architectures",)),
]  # fmt: skip

BAD_FIELDS = [
    *(
        Bad(f"no {name}", without(name), ("config.json", name))
        for name in (
            "attention_bias",
            "head_dim",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "layer_types",
            "max_position_embeddings",
            "num_attention_heads",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "num_local_experts",
            "rms_norm_eps",
            "rope_scaling",
            "rope_theta",
            "sliding_window",
            "vocab_size",
        )
    ),
    Bad("no architectures", without("architectures"), ("config.json", "architecture")),
    *(
        Bad(f"no rope_scaling.{name}", without_rope(name), ("config.json", name))
        for name in ("factor", "original_max_position_embeddings")
    ),
    Bad("no several", without("head_dim", "vocab_size"), ("head_dim is", "vocab_size is")),
    Bad("hidden_size a text", config(hidden_size="64"), ("hidden_size", "'64'")),
    Bad("hidden_size a fraction", config(hidden_size=64.5), ("hidden_size", "64.5")),
    Bad("hidden_size true", config(hidden_size=True), ("hidden_size", "True")),
    Bad("hidden_size another", config(hidden_size=72), ("[131, 64]", "[131, 72]", "more")),
    Bad("hidden_size negative", config(hidden_size=-64), ("-64",)),
    Bad("sliding_window zero", config(sliding_window=0), ("sliding_window", "0")),
    Bad("no expert chosen", config(num_experts_per_tok=0), ("num_experts_per_tok", "0")),
    Bad("more chosen than there are", config(num_experts_per_tok=6), ("num_experts_per_tok", "6")),
    Bad("no layers", config(num_hidden_layers=0, layer_types=[]), ("num_hidden_layers",)),
    Bad("vocab_size another", config(vocab_size=130), ("[131, 64]", "[130, 64]")),
    Bad("layer_types too short", config(layer_types=["full_attention"]), ("layer_types",)),
    Bad("layer_types unknown", config(layer_types=["linear"] * 3), ("layer_types", "linear")),
    Bad("layer_types lists", config(layer_types=[["full_attention"]] * 3), ("layer_types",)),
    Bad("no key-value heads", config(num_key_value_heads=0), ("num_key_value_heads",)),
    Bad("heads not in groups", config(num_key_value_heads=3), ("num_key_value_heads", "3")),
    Bad("hidden_act another", config(hidden_act="gelu"), ("hidden_act", "gelu")),
    Bad("no attention bias", config(attention_bias=False), ("attention_bias",)),
    Bad("rope_scaling a text", config(rope_scaling="yarn"), ("rope_scaling",)),
    Bad("rope of another type", config(rope_scaling={"rope_type": "llama3"}), ("llama3",)),
    Bad("rope_theta a text", config(rope_theta="150000"), ("rope_theta",)),
    Bad(
        "rope schemas that differ",
        config(rope_parameters={"rope_type": "yarn", "factor": 16.0}),
        ("rope_parameters", "factor"),
    ),
    Bad("swiglu_limit null", config(swiglu_limit=None), ("swiglu_limit",)),
    Bad("swiglu_limit a text", config(swiglu_limit="seven"), ("swiglu_limit",)),
    Bad("initializer_range a text", config(initializer_range="x"), ("initializer_range",)),
]


def assert_all_refuse(invoke: Run, bad: Bad, source: Path, target: Path) -> None:
    """The conversion, its plan and ``inspect`` each name the problem."""
    importing = source.name.startswith("hf")
    flags = ("--hf-model", "--megatron-path") if importing else ("--megatron-path", "--hf-path")
    command = ["import" if importing else "export", flags[0], source, flags[1], target]
    assert_refused(invoke(*command), 1, *bad.says)
    assert_refused(invoke(*command, "--overwrite", "--json", "--no-progress"), 1, *bad.says)
    planned = invoke("plan", flags[0], source)
    if bad.plan is False or (bad.plan is None and not planned.returncode):
        assert planned.returncode == 0, planned.stderr
    else:
        assert_refused(planned, 1, *bad.says)
    table = invoke("inspect", source)
    assert table.returncode == 1
    assert "Traceback" not in table.stderr
    assert "internal error" not in table.stderr
    inspected = invoke("inspect", source, "--json")
    assert inspected.returncode == 1, inspected.stdout
    assert "Traceback" not in inspected.stderr
    assert "internal error" not in inspected.stderr
    problems = json.loads(inspected.stdout)["problems"] if inspected.stdout else []
    text = "\n".join([*problems, inspected.stderr])
    for part in bad.says:
        assert part in text or part.endswith(("problems", "more")), text


@pytest.mark.parametrize("bad", ids([*BAD_HF, *BAD_FIELDS]))
def test_bad_hugging_face_folder(
    bad: Bad, hf: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    bad.damage(hf)
    unchanged()
    assert_all_refuse(invoke, bad, hf, tmp_path / "new" / "deep" / "megatron")


BLOCKS, SCALES = DOWN_1 + "_blocks", DOWN_1 + "_scales"
BAD_MXFP4 = [
    Bad("scales missing", lambda f: edit_tensors(f, lambda t: t.pop(SCALES)), (SCALES, "missing")),
    Bad("blocks missing", lambda f: edit_tensors(f, lambda t: t.pop(BLOCKS)), (BLOCKS, "missing")),
    Bad("both missing", lambda f: edit_tensors(f, lambda t: (t.pop(BLOCKS), t.pop(SCALES))),
        (BLOCKS, SCALES, "missing")),
    Bad("scales of another type", set_tensor(SCALES, lambda t: t.to(torch.int8)),
        (DOWN_1, "I8", "U8")),
    Bad("scales of another shape", set_tensor(SCALES, lambda t: t[:4].clone()),
        (DOWN_1, "[4, 64, 3]")),
    Bad("blocks half as long", set_tensor(BLOCKS, lambda t: t[..., :8].contiguous()),
        (DOWN_1, "[5, 64, 3, 8]")),
    Bad("orientation of BF16", lambda f: edit_tensors(f, lambda t: t.update({
        BLOCKS: torch.zeros(5, 96, 2, 16, dtype=torch.uint8),
        SCALES: torch.zeros(5, 96, 2, dtype=torch.uint8)})),
        (DOWN_1, "[5, 64, 96]", "[5, 96, 64]")),
    Bad("not declared", without("quantization_config"), ("mxfp4", "--codec mxfp4")),
]  # fmt: skip


@pytest.mark.parametrize("bad", ids(BAD_MXFP4))
def test_bad_mxfp4_folder(
    bad: Bad, hf_mxfp4: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    bad.damage(hf_mxfp4)
    unchanged()
    assert_all_refuse(invoke, bad, hf_mxfp4, tmp_path / "new" / "deep" / "megatron")


# ---- ways to damage a Megatron folder


ITER = "iter_0000000"
MIDDLE = "__2_0.distcp"


def iteration(root: Path, name: str) -> Path:
    return root / ITER / name


def edit_contents(root: Path, change: Callable[[metadata.Contents], metadata.Contents]) -> None:
    """Write another ``.metadata``."""
    path = iteration(root, ".metadata")
    path.write_bytes(metadata.dump(change(metadata.load(root / ITER))))


def edit_tensor(key: str, change: Callable[[metadata.Tensor], metadata.Tensor | None]) -> Any:
    def damage(root: Path) -> None:
        def edited(contents: metadata.Contents) -> metadata.Contents:
            tensors = dict(contents.tensors)
            new = change(tensors.pop(key))
            return replace(contents, tensors=tensors | ({key: new} if new else {}))

        edit_contents(root, edited)

    return damage


FC1, WORDS = "decoder.layers.mlp.experts.experts.linear_fc1.weight", "output_layer.weight"


def without_a_chunk(tensor: metadata.Tensor) -> metadata.Tensor:
    return replace(tensor, chunks=tensor.chunks[:7] + tensor.chunks[8:])


def a_chunk_twice(tensor: metadata.Tensor) -> metadata.Tensor:
    """As many elements as ever, but one box is there twice and another not at all."""
    chunks = list(tensor.chunks)
    chunks[7] = chunks[6]
    return replace(tensor, chunks=tuple(chunks))


def file_of_chunk(tensor: metadata.Tensor, file: str) -> metadata.Tensor:
    first, *rest = tensor.chunks
    return replace(tensor, chunks=(replace(first, at=replace(first.at, file=file)), *rest))


BAD_MEGATRON = [
    Bad("distcp missing", lambda f: iteration(f, MIDDLE).unlink(), (MIDDLE, "missing"), False),
    Bad("distcp cut", lambda f: cut(iteration(f, MIDDLE), -1), (MIDDLE, "cut short"), False),
    Bad("distcp empty", lambda f: cut(iteration(f, MIDDLE), 0), (MIDDLE, "cut short"), False),
    Bad("no .metadata", lambda f: iteration(f, ".metadata").unlink(), (".metadata",)),
    Bad("no metadata.json", lambda f: iteration(f, "metadata.json").unlink(), ("metadata.json",)),
    Bad(".metadata empty", lambda f: cut(iteration(f, ".metadata"), 0), (".metadata", "damaged")),
    Bad(".metadata cut", lambda f: cut(iteration(f, ".metadata"), -100), (".metadata", "damaged")),
    Bad(
        ".metadata of something else",
        lambda f: iteration(f, ".metadata").write_bytes(pickle.dumps({"a": 1})),
        (".metadata", "fetch it again"),
    ),
    Bad("tensor missing", edit_tensor(WORDS, lambda t: None), (WORDS, "is missing")),
    Bad(
        "one too many",
        lambda f: edit_contents(
            f, lambda c: replace(c, tensors={**c.tensors, "extra.weight": c.tensors[WORDS]})
        ),
        ("extra.weight", "no rule maps it"),
    ),
    Bad(
        "wrong shape",
        edit_tensor(WORDS, lambda t: replace(t, spec=replace(t.spec, shape=(131, 32)))),
        (WORDS, "[131, 32]", "[131, 64]"),
    ),
    Bad(
        "a layer less",
        edit_tensor(FC1, lambda t: replace(t, spec=replace(t.spec, shape=(2, *t.spec.shape[1:])))),
        ("decoder.layers.2.mlp.experts.linear_fc1.weight", "is missing"),
    ),
    Bad(
        "integers",
        edit_tensor(WORDS, lambda t: replace(t, spec=replace(t.spec, dtype="I16"))),
        (WORDS, "I16"),
    ),
    Bad(
        "a path in .metadata",
        edit_tensor(WORDS, lambda t: file_of_chunk(t, "../" + MIDDLE)),
        (".metadata", "../" + MIDDLE),
    ),
    Bad("a chunk missing", edit_tensor(FC1, without_a_chunk), (FC1, "cover"), None),
    Bad("a chunk twice", edit_tensor(FC1, a_chunk_twice), (FC1, "cover"), None),
    Bad("tracker naming an absent iteration",
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"), ("latest_checkpointed_iteration.txt", "iter_0000007")),
    Bad("config no JSON", lambda f: iteration(f, "huggingface/config.json").write_text("{"),
        ("config.json", "JSON")),
    Bad("config without a field", lambda f: edit_json(
        iteration(f, "huggingface/config.json"), lambda c: c.pop("head_dim")), ("config.json", "head_dim is missing")),
]  # fmt: skip


@pytest.mark.parametrize("bad", ids(BAD_MEGATRON))
def test_bad_megatron_folder(
    bad: Bad, megatron: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    bad.damage(megatron)
    unchanged()
    assert_all_refuse(invoke, bad, megatron, tmp_path / "new" / "deep" / "hf")


def test_damaged_item(
    megatron: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    """A data file of the right length whose zip frames are zeros is found out when it is read."""
    path = iteration(megatron, MIDDLE)
    path.write_bytes(bytes(path.stat().st_size))
    unchanged()
    target = tmp_path / "new" / "deep" / "hf"
    done = invoke("export", "--megatron-path", megatron, "--hf-path", target)
    assert_refused(done, 1, MIDDLE, "damaged")


@pytest.mark.parametrize("field", [26, 28], ids=["length of the name", "length of the padding"])
def test_damaged_frame(
    field: int, megatron: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    """A zip header that places the data a few bytes later must not shift the weights."""
    chunk = TorchDistSource(megatron).contents.tensors[FC1].chunks[3].at
    with open(iteration(megatron, chunk.file), "r+b") as file:
        file.seek(chunk.offset)
        item = file.read(chunk.length)
        header = item.rindex(b"PK\3\4")  # of the record with the data
        (length,) = struct.unpack_from("<H", item, header + field)
        file.seek(chunk.offset + header + field)
        file.write(struct.pack("<H", length + 4))
    unchanged()
    done = invoke("export", "--megatron-path", megatron, "--hf-path", tmp_path / "new" / "hf")
    assert_refused(done, 1, chunk.file, "damaged")


def test_another_reference_on_export(
    megatron: Path, tmp_path: Path, invoke: Run, write_tiny: Any, unchanged: Callable[[], None]
) -> None:
    other = write_tiny(tmp_path / "other", sliding_window=64, rope_theta=10000)
    unchanged()
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "new" / "hf"]
    done = invoke(*command, "--hf-model", other)
    assert_refused(done, 1, str(other), "rotary_base", "window_size")


def test_the_quantized_reference_is_the_same_model(
    megatron: Path, tmp_path: Path, invoke: Run, hf_mxfp4: Path
) -> None:
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "hf"]
    done = invoke(*command, "--hf-model", hf_mxfp4)
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_bytes())


# ---- pickles that would do something


class Evil:
    """Unpickled by a trusting reader, it makes a file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def evil(kind: str, path: Path) -> Evil:
    return {
        "mknod": Evil(os.mknod, str(path)),
        "system": Evil(os.system, f"touch {path}"),
        "eval": Evil(eval, f"__import__('os').mknod({str(path)!r})"),
        "subprocess": Evil(subprocess.check_call, ["touch", str(path)]),
    }[kind]


def evil_item(length: int, payload: Evil) -> bytes:
    """A torch.save archive of exactly ``length`` bytes whose pickle is the payload."""

    def archive(filler: int) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
            file.writestr("archive/data/0", bytes(filler))
        return out.getvalue()

    return archive(length - len(archive(0)))


def put_metadata(root: Path, payload: Evil) -> str:
    iteration(root, ".metadata").write_bytes(pickle.dumps(payload, protocol=4))
    return ".metadata"


def put_inside_metadata(root: Path, payload: Evil) -> str:
    """Beside contents that are right in all else."""
    import torch.distributed.checkpoint.metadata as dcp

    raw = pickle.loads(iteration(root, ".metadata").read_bytes())
    assert isinstance(raw, dcp.Metadata)
    raw.planner_data = payload
    iteration(root, ".metadata").write_bytes(pickle.dumps(raw, protocol=4))
    return ".metadata"


def put_common(root: Path, payload: Evil) -> str:
    """Where nothing but ``common.pt`` says what model it is."""
    for name in ("huggingface/config.json", "run_config.yaml"):
        iteration(root, name).unlink()
    torch.save({"args": payload}, iteration(root, "common.pt"))
    return "common.pt"


def put_run_config(root: Path, payload: Evil) -> str:
    iteration(root, "huggingface/config.json").unlink()
    function, arguments = payload.__reduce__()
    tag = f"!!python/object/apply:{function.__module__}.{function.__name__}"
    iteration(root, "run_config.yaml").write_text(f"model: {tag} {list(arguments)!r}\n")
    return "run_config.yaml"


def put_item(root: Path, payload: Evil) -> str:
    chunk = TorchDistSource(root).contents.tensors[FC1].chunks[3].at
    with open(iteration(root, chunk.file), "r+b") as file:
        file.seek(chunk.offset)
        file.write(evil_item(chunk.length, payload))
    return chunk.file


@pytest.mark.parametrize("kind", ["mknod", "system", "eval", "subprocess"])
@pytest.mark.parametrize(
    "put", [put_metadata, put_inside_metadata, put_common, put_run_config, put_item]
)
def test_no_pickle_is_executed(
    put: Callable[[Path, Evil], str], kind: str, megatron: Path, tmp_path: Path, invoke: Run,
    unchanged: Callable[[], None],
) -> None:  # fmt: skip
    proof, trace = tmp_path / "proof", tmp_path / "trace"
    pickle.loads(pickle.dumps(evil(kind, proof)))
    assert proof.exists(), "this payload would not have shown anything"
    name = put(megatron, evil(kind, trace))
    unchanged()
    target = tmp_path / "new" / "hf"
    done = invoke("export", "--megatron-path", megatron, "--hf-path", target)
    assert_refused(done, 1, name)
    inspected = invoke("inspect", megatron)
    assert inspected.returncode == (0 if put is put_item else 1)
    assert invoke("plan", "--megatron-path", megatron).returncode == inspected.returncode
    assert not trace.exists()


def test_training_state_is_never_unpickled(megatron: Path, tmp_path: Path, invoke: Run) -> None:
    """Where the config is there, no pickle but ``.metadata`` and the tensors' own is read at all."""
    trace = tmp_path / "trace"
    for path in (
        iteration(megatron, "common.pt"),
        iteration(megatron, "train_state.pt"),
        iteration(megatron, "__extra_state.distcp"),
        megatron / "latest_train_state.pt",
    ):
        assert path.is_file()
        path.write_bytes(evil_item(max(path.stat().st_size, 600), evil("mknod", trace)))
    done = invoke("export", "--megatron-path", megatron, "--hf-path", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert invoke("inspect", megatron).returncode == 0
    assert not trace.exists()


# ---- targets and sources that cannot be


Sides = list[tuple[list[Any], str]]


@pytest.fixture
def sides(hf: Path, megatron: Path) -> Sides:
    """(command with its source, flag of its target) of both directions."""
    return [
        (["import", "--hf-model", hf], "--megatron-path"),
        (["export", "--megatron-path", megatron], "--hf-path"),
    ]


def test_target_not_empty(
    sides: Sides, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("precious")
    unchanged()
    for command, flag in sides:
        done = invoke(*command, flag, tmp_path / "out")
        assert_refused(done, 1, str(tmp_path / "out"), "not empty", "--overwrite")


def test_target_a_file_or_a_link(
    sides: Sides, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    unchanged()
    for command, flag in sides:
        for name in ("file", "link", "dangling", "file/below"):
            done = invoke(*command, flag, tmp_path / name, "--overwrite")
            assert_refused(done, 1, str(tmp_path / "file" if "file" in name else tmp_path / name))


@pytest.mark.parametrize("name", ["", ".", "..", "../here"])
def test_target_that_is_where_the_user_stands(
    name: str,
    sides: Sides,
    tmp_path: Path,
    invoke: Run,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``--megatron-path "$UNSET" --overwrite`` must not replace the working directory."""
    (tmp_path / "home" / "here").mkdir(parents=True)
    (tmp_path / "home" / "here" / "mine.txt").write_text("precious")
    monkeypatch.chdir(tmp_path / "home" / "here")
    unchanged()
    for command, flag in sides:
        done = invoke(*command, flag, name, "--overwrite")
        assert done.returncode in (1, 2), done.stdout
        assert flag in done.stderr or "choose another target" in done.stderr


@pytest.mark.parametrize("where", [".", "below", "below/deeper", ".."])
def test_target_inside_the_source_or_around_it(
    where: str, sides: Sides, invoke: Run, unchanged: Callable[[], None]
) -> None:
    unchanged()
    for command, flag in sides:
        done = invoke(*command, flag, command[-1] / where, "--overwrite")
        assert_refused(done, 1, "source", "choose another target")


def test_target_is_the_root_folder_of_the_iteration_read(
    megatron: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    unchanged()
    command = ["export", "--megatron-path", megatron / ITER, "--overwrite"]
    for target in (megatron, megatron / ITER / "hf"):
        assert_refused(invoke(*command, "--hf-path", target), 1, "choose another target")


def test_target_reached_through_a_link(
    hf: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    (tmp_path / "link").symlink_to(hf)
    unchanged()
    done = invoke("import", "--hf-model", hf, "--megatron-path", tmp_path / "link" / "out")
    assert_refused(done, 1, "choose another target")


def test_reference_is_not_overwritten(
    hf: Path, megatron: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    """The reference is read from; replacing it would destroy the user's original."""
    unchanged()
    command = ["export", "--megatron-path", megatron, "--hf-model", hf, "--overwrite"]
    assert_refused(invoke(*command, "--hf-path", hf), 1, str(hf), "choose another target")


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_source_no_folder(
    kind: str, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    source = tmp_path / "source"
    if kind == "file":
        source.write_text("{}")
    if kind == "empty":
        source.mkdir()
    unchanged()
    for command in (
        ["import", "--hf-model", source, "--megatron-path", tmp_path / "out"],
        ["export", "--megatron-path", source, "--hf-path", tmp_path / "out"],
        ["plan", "--hf-model", source],
        ["plan", "--megatron-path", source],
        ["inspect", source],
    ):
        assert_refused(invoke(*command), 1, str(source))


def test_sides_exchanged(
    hf: Path, megatron: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    """Each command says which format it looked for."""
    unchanged()
    out = tmp_path / "out"
    done = invoke("import", "--hf-model", megatron, "--megatron-path", out)
    assert_refused(done, 1, str(megatron), "huggingface")
    done = invoke("export", "--megatron-path", hf, "--hf-path", out)
    assert_refused(done, 1, str(hf), "torch_dist")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Give root's rights away for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_folder(hf: Path) -> Iterator[Path]:
    """A checkpoint where any user could reach it; pytest's own folders are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(shutil.copytree(hf, Path(name) / "hf"))
        for path in folder.iterdir():
            path.chmod(0o644)
        yield folder


@pytest.mark.parametrize("which", ["hf", f"hf/{SHARDS[1]}", "hf/config.json", f"hf/{INDEX}"])
def test_unreadable(which: str, open_folder: Path, invoke: Run, tree: Tree) -> None:
    parent = open_folder.parent
    before = tree(parent)
    command = ["import", "--hf-model", open_folder, "--megatron-path", parent / "out" / "megatron"]
    assert invoke("plan", "--hf-model", open_folder).returncode == 0
    (parent / which).chmod(0)
    os.chmod(parent, 0o777)
    with as_nobody():
        imported, planned = invoke(*command), invoke("plan", "--hf-model", open_folder)
        inspected = invoke("inspect", open_folder)
    (parent / which).chmod(0o755)
    for done in (imported, planned, inspected):
        assert_refused(done, 1, str(parent / which), "Permission denied")
    assert tree(parent) == before


def test_unwritable_parent(open_folder: Path, invoke: Run, tree: Tree) -> None:
    parent = open_folder.parent
    before = tree(parent)
    assert invoke("plan", "--hf-model", open_folder).returncode == 0
    with as_nobody():
        done = invoke("import", "--hf-model", open_folder, "--megatron-path", parent / "a" / "b")
    assert_refused(done, 1, str(parent), "cannot be written to", "choose another target")
    assert tree(parent) == before


@pytest.mark.slow
def test_hub_id_without_network(tmp_path: Path, run_cli: Run, tree: Tree) -> None:
    """In a process: huggingface_hub reads its settings when it is imported."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    home = tmp_path / "cwd"
    home.mkdir()
    name = "openai/gpt-oss-20b"
    done = run_cli("import", "--hf-model", name, "--megatron-path", "out", env=env, cwd=home)
    assert_refused(done, 1, name, "HF_HUB_OFFLINE")
    done = run_cli("inspect", name, env=env, cwd=home)
    assert_refused(done, 1, name, "HF_HUB_OFFLINE")
    assert tree(home) == {}
    assert not any("gpt-oss" in entry for entry in tree(tmp_path)), tree(tmp_path)


# ---- disk and memory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            folder.rmdir()
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_disk_too_small(
    sides: Sides, small_disk: Callable[[str], Path], invoke: Run, tree: Tree
) -> None:
    disk = small_disk("size=256k")
    for command, flag in sides:
        for target in (disk / "out", disk / "new" / "deep"):
            done = invoke(*command, flag, target)
            assert_refused(done, 4, str(disk), "kB are free", "make room")
            assert tree(disk) == {}
        planned = json.loads(invoke("plan", *command[1:], flag, disk / "out", "--json").stdout)
        assert planned["disk_needed"] > planned["disk_free"] == 256 * 1024


@pytest.mark.parametrize("inodes", [1, 2])
def test_disk_without_inodes(
    inodes: int, sides: Sides, small_disk: Callable[[str], Path], invoke: Run, tree: Tree
) -> None:
    """Bytes are free, but no folder or no file can be made."""
    disk = small_disk(f"size=64m,nr_inodes={inodes}")
    for command, flag in sides:
        done = invoke(*command, flag, disk / "out")
        assert_refused(done, 4, str(disk), "full", "make room")
        assert tree(disk) == {}


def test_disk_read_only(
    sides: Sides, small_disk: Callable[[str], Path], invoke: Run, tree: Tree
) -> None:
    disk = small_disk("size=64m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for command, flag in sides:
        done = invoke(*command, flag, disk / "out")
        assert_refused(done, 1, str(disk), "cannot be written to")
        assert tree(disk) == {}


def test_target_a_mount_point(
    sides: Sides, small_disk: Callable[[str], Path], invoke: Run, tree: Tree
) -> None:
    disk = small_disk("size=64m")
    for command, flag in sides:
        assert_refused(invoke(*command, flag, disk), 1, str(disk), "mount point")
        assert tree(disk) == {}


def test_disk_filled_by_others_meanwhile(
    hf: Path, small_disk: Callable[[str], Path], invoke: Run, tree: Tree, tmp_path: Path
) -> None:
    """Room at the start and none in the middle: exit code 4, and the work can be taken up."""
    from gptoss_convert.convert import prepare_import
    from gptoss_convert.errors import ResourceError

    disk = small_disk("size=64m")
    written = 0

    def crowd(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > 300_000 and not (disk / "filler").exists():
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - 4096))

    with pytest.raises(ResourceError, match=r"full; make room and run the same command again"):
        prepare_import(hf).run(disk / "out", workers=1, progress=crowd)
    assert not (disk / "out").exists()
    (disk / "filler").unlink()
    assert invoke("import", "--hf-model", hf, "--megatron-path", disk / "out").returncode == 0
    whole = tmp_path / "whole"
    assert invoke("import", "--hf-model", hf, "--megatron-path", whole).returncode == 0
    assert tree(disk) == {"out": "folder"} | {f"out/{k}": v for k, v in tree(whole).items()}


def test_memory_too_small(
    sides: Sides, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    unchanged()
    for command, flag in sides:
        done = invoke(*command, flag, tmp_path / "new" / "out", "--max-memory", "1MiB")
        assert_refused(done, 4, "--max-memory", "give at least")
        planned = invoke("plan", *command[1:], flag, tmp_path / "new", "--max-memory", "1MiB")
        assert_refused(planned, 4, "--max-memory", "give at least")


def test_memory_that_is_enough_is_what_the_message_says(
    hf: Path, tmp_path: Path, invoke: Run
) -> None:
    command = ["import", "--hf-model", hf, "--megatron-path", tmp_path / "out", "--max-memory"]
    words = invoke(*command, "1MiB").stderr.split("needs ")[1].split(";")[0].split()
    enough = f"{float(words[0]) + 0.01:.2f}{words[1]}"
    assert invoke(*command, enough).returncode == 0


# ---- the command line itself


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--torch-dtype", "int8"], "--torch-dtype"),
        (["--max-memory", "lots"], "lots"),
        (["--max-memory", "-1GiB"], "no size"),
        (["--max-memory", "0"], "no size"),
        (["--max-memory", "nanKB"], "no size"),
        (["--max-memory", ""], "no size"),
        (["--workers", "0"], "--workers"),
        (["--workers", "many"], "--workers"),
        (["--no-such-flag"], "--no-such-flag"),
        (["stray"], "stray"),
    ],
)
def test_wrong_value_on_import(
    arguments: list[str], says: str, hf: Path, tmp_path: Path, invoke: Run,
    unchanged: Callable[[], None],
) -> None:  # fmt: skip
    unchanged()
    command = ["import", "--hf-model", hf, "--megatron-path", tmp_path / "out"]
    assert_usage(invoke(*command, *arguments), says)


def test_wrong_value_on_export(
    megatron: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    unchanged()
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "out"]
    for arguments in (["--export-dtype", "int8"], ["--hf-pth", "x"], ["--max-memory", "1XB"]):
        assert_usage(invoke(*command, *arguments), arguments[0 if "pth" in arguments[0] else 1])


@pytest.mark.parametrize("command", ["import", "export", "plan", "inspect"])
def test_missing_flags(command: str, invoke: Run) -> None:
    assert_usage(invoke(command), "Missing option")


def test_unknown_command(invoke: Run) -> None:
    assert_usage(invoke("improt"), "improt")


def test_missing_target_is_found_before_the_source_is_touched(tmp_path: Path, invoke: Run) -> None:
    """A hub id would be downloaded whole before the user learns of the missing flag."""
    assert_usage(invoke("import", "--hf-model", tmp_path / "absent"), "--megatron-path")
    assert_usage(invoke("export", "--megatron-path", tmp_path / "absent"), "--hf-path")


@pytest.mark.parametrize(
    ("flag", "offer"), [("--model", "gpt-oss"), ("--codec", "mxfp4"), ("--format", "torch_dist")]
)
def test_unknown_plugin_name(
    flag: str, offer: str, hf: Path, tmp_path: Path, invoke: Run, unchanged: Callable[[], None]
) -> None:
    """A name that nothing answers to is refused, and the names there are are listed."""
    unchanged()
    command = ["import", "--hf-model", hf, "--megatron-path", tmp_path / "out"]
    assert_refused(invoke(*command, flag, "nothing"), 1, f"{flag} nothing", offer)


def test_too_large_for_float16(
    tmp_path: Path, invoke: Run, write_tiny: Any, unchanged: Callable[[], None]
) -> None:
    """Found when the tensor is reached; what was written before it goes, new folders too."""
    source = write_tiny(tmp_path / "hf")
    norm = "model.norm.weight"
    edit_tensors(source, lambda t: t.update({norm: t[norm] * 1e6}), SHARDS[2])
    unchanged()
    command = ["import", "--hf-model", source, "--megatron-path", tmp_path / "new" / "deep" / "out"]
    done = invoke(*command, "--torch-dtype", "float16")
    warning, error = done.stderr.split("\n", 1)
    assert "rounding BF16 to F16" in warning
    done.stderr = error
    assert_refused(done, 1, "decoder.final_layernorm.weight", "F16", "wider")


# ---- --debug


@pytest.mark.slow
def test_debug_shows_where(hf: Path, tmp_path: Path, run_cli: Run, invoke: Run) -> None:
    (hf / SHARDS[1]).unlink()
    command = ["import", "--hf-model", hf, "--megatron-path", tmp_path / "out"]
    quiet, loud = run_cli(*command), run_cli(*command, "--debug")
    assert_refused(quiet, 1, SHARDS[1])
    assert loud.returncode == 1
    assert loud.stderr.startswith("Traceback (most recent call last)")
    assert loud.stderr.endswith(quiet.stderr)
    inside = invoke(*command)
    assert (inside.returncode, inside.stderr) == (quiet.returncode, quiet.stderr)


def test_debug_in_this_process(hf: Path, tmp_path: Path, invoke: Run) -> None:
    for command in (
        ["import", "--hf-model", tmp_path / "absent", "--megatron-path", tmp_path / "out"],
        ["export", "--megatron-path", tmp_path / "absent", "--hf-path", tmp_path / "out"],
        ["inspect", tmp_path / "absent"],
        ["plan", "--hf-model", tmp_path / "absent"],
    ):
        assert "Traceback" in invoke(*command, "--debug").stderr
        assert "Traceback" not in invoke(*command).stderr
