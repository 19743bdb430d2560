"""Every reader on bytes that hypothesis makes: a value or a refusal, at once, and nothing executed."""

from __future__ import annotations

import io
import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert.blockio import BlockReader
from gptoss_convert.errors import ConvertError
from gptoss_plugins.huggingface import headers
from gptoss_plugins.megatron import folder, metadata, runconfig, safe_pickle, torchzip
from gptoss_plugins.megatron.legacy import rankfile
from gptoss_plugins.megatron.ziprecords import directory

PATIENCE = 10  # seconds
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
happened: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def watch() -> None:
    """Hooks cannot be taken away again; this one only writes down."""
    sys.addaudithook(lambda event, _: happened.append(event) if event in FORBIDDEN else None)


def refuses_or_reads(read: Callable[[], Any]) -> None:
    """Anything but a ConvertError goes through to the test."""
    started = time.monotonic()
    happened.clear()
    told = "; "
    try:
        read()
    except ConvertError as error:
        told = str(error)
    assert "; " in told  # what to do
    assert len(told) < 5000
    assert "\n" not in told or "problems" in told
    assert not happened
    assert time.monotonic() - started < PATIENCE


# ---- pickles, opcode by opcode


NUMBER = st.integers(0, 255).map(lambda n: bytes([n]))
TEXT = st.sampled_from([b"", b"x", b"args", b"model", b"storage", b"0", b"__defaults__", b"a" * 60])
GLOBALS = st.sampled_from([
    b"torch\nSize", b"torch\nFloatStorage", b"torch\nbfloat16", b"torch\ndevice", b"os\nsystem",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v3", b"builtins\ngetattr",
    b"torch._utils\n_rebuild_parameter", b"torch._tensor\n_rebuild_from_type_v2", b"builtins\nset",
    b"collections\nOrderedDict", b"collections\ndefaultdict", b"argparse\nNamespace",
    b"_codecs\nencode", b"builtins\nfrozenset", b"builtins\nslice", b"megatron.core.x\nY",
    b"torch.distributed.checkpoint.metadata\nMetadata", b"builtins\ndict", b"_io\nBytesIO",
])  # fmt: skip
PLAIN = st.sampled_from([bytes([b]) for b in b"().01N]}2RbasuetlodQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"])  # fmt: skip
OPCODES = st.one_of(
    PLAIN,
    PLAIN,
    NUMBER.map(lambda n: b"K" + n),
    st.integers(0, 9).map(lambda n: b"h" + bytes([n])),
    st.integers(0, 9).map(lambda n: b"q" + bytes([n])),
    TEXT.map(lambda t: b"\x8c" + bytes([len(t)]) + t),
    GLOBALS.map(lambda name: b"c" + name + b"\n"),
    st.sampled_from(
        [b"\x8a\x08" + b"\xff" * 8, b"G" + b"\x7f" * 8, b"I01\n", b"L9L\n", b"V\\u0\n"]
    ),
)
PICKLES = st.lists(OPCODES, max_size=40).map(lambda ops: b"\x80\x04" + b"".join(ops) + b".")


def test_pickles(fuzz: Any) -> None:
    @given(PICKLES)
    def try_one(data: bytes) -> None:
        refuses_or_reads(lambda: safe_pickle.load(data, "x"))

    fuzz(try_one, 1000)


def tiled(folder: Path) -> bool:
    """Whether all tensors are whole, as ``check`` of a source looks it up."""
    return all(metadata.is_tiled(tensor) for tensor in metadata.load(folder).tensors.values())


def test_metadata(forms: dict[str, Path], tmp_path: Path, fuzz: Any) -> None:
    """Right but for stretches that are opcodes of any kind."""
    whole = (forms["torch_dist"] / "iter_0000000" / ".metadata").read_bytes()

    @given(st.floats(0, 1), st.lists(OPCODES, max_size=4), st.integers(0, 8))
    def try_one(place: float, more: list[bytes], skip: int) -> None:
        at = int(place * len(whole))
        (tmp_path / ".metadata").write_bytes(whole[:at] + b"".join(more) + whole[at + skip :])
        refuses_or_reads(lambda: tiled(tmp_path))

    fuzz(try_one, 150)


# ---- what holds pickles


def patches(data: bytes) -> st.SearchStrategy[bytes]:
    """A few places of what is no tensor's data, which comes in the middle of an archive."""
    edges = st.one_of(
        st.integers(0, min(len(data), 600) - 1),
        st.integers(max(0, len(data) - 600), len(data) - 1),
    )
    values = st.sampled_from(
        [b"\0", b"\1", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f", b"PK"]
    )
    patch = st.tuples(edges, values)

    def apply(found: list[tuple[int, bytes]]) -> bytes:
        out = bytearray(data)
        for at, value in found:
            out[at : at + len(value)] = value
        return bytes(out)

    return st.lists(patch, min_size=1, max_size=3).map(apply)


def archive() -> bytes:
    out = io.BytesIO()
    torch.save(torch.arange(12.0).reshape(3, 4), out)
    return out.getvalue()


def test_items(tmp_path: Path, fuzz: Any) -> None:
    @given(patches(archive()))
    def try_one(data: bytes) -> None:
        (tmp_path / "item").write_bytes(data)
        file = BlockReader(tmp_path / "item")
        refuses_or_reads(lambda: torchzip.read_item(file, 0, len(data)))
        refuses_or_reads(lambda: torchzip.read_object(file, 0, len(data), "x"))

    fuzz(try_one, 150)


def test_rank_files(forms: dict[str, Path], tmp_path: Path, fuzz: Any) -> None:
    whole = (forms["torch"] / "iter_0000000/mp_rank_00/model_optim_rng.pt").read_bytes()

    def framed(pickled: bytes) -> bytes:
        head, records = torchzip.preamble(pickled)
        return head + directory(records, len(head))

    models = PICKLES.map(lambda data: b"\x80\x04}\x8c\x05model" + data[2:-1] + b"s.")

    @given(st.one_of(patches(whole), PICKLES.map(framed), models.map(framed)))
    def try_one(data: bytes) -> None:
        (tmp_path / "rank.pt").write_bytes(data)
        refuses_or_reads(lambda: rankfile.read(tmp_path / "rank.pt"))

    fuzz(try_one, 200)


# ---- text


WORDS = st.sampled_from(
    ["a", "dtype", "shape", "data_offsets", "weight_map", "__metadata__", "BF16"]
)
ANY_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 1 << 65), st.floats(), WORDS, st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)
FACTS = st.fixed_dictionaries({
    "dtype": st.one_of(st.sampled_from(["BF16", "U8", "F4"]), ANY_JSON),
    "shape": st.one_of(st.lists(st.integers(0, 9), max_size=3), ANY_JSON),
    "data_offsets": st.one_of(st.lists(st.integers(0, 99), min_size=2, max_size=2), ANY_JSON),
})  # fmt: skip
HEADERS = st.one_of(ANY_JSON, st.dictionaries(st.text(max_size=5), st.one_of(FACTS, ANY_JSON)))


def test_headers(tmp_path: Path, fuzz: Any) -> None:
    @given(HEADERS.map(json.dumps), st.binary(max_size=9), st.integers(-2, 2))
    def try_one(text: str, data: bytes, off: int) -> None:
        length = struct.pack("<q", max(0, len(text) + off))
        (tmp_path / "x.safetensors").write_bytes(length + text.encode() + data)
        refuses_or_reads(lambda: headers.read_header(tmp_path / "x.safetensors"))

    fuzz(try_one, 150)


def test_indexes(tmp_path: Path, fuzz: Any) -> None:
    maps = st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=6), ANY_JSON))

    @given(st.one_of(ANY_JSON, st.fixed_dictionaries({"weight_map": maps})).map(json.dumps))
    def try_one(text: str) -> None:
        (tmp_path / headers.INDEX).write_text(text)
        refuses_or_reads(lambda: headers.read_shards(tmp_path))
        refuses_or_reads(lambda: headers.shard_files(tmp_path))

    fuzz(try_one, 200)


YAML = st.lists(
    st.sampled_from([
        "model", ":", " ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a ", "<<", "? ", "| ",
        "!!python/name:os.system ", "!!binary ", "!!set ", "1", "9999-99-99", "1:60:60", ".inf", "#",
        "'", '"', "\\x", "%YAML 9", "---", "\t", "_", "activation_func", "_target_",
    ]), max_size=30,
)  # fmt: skip


def test_run_configs(tmp_path: Path, fuzz: Any) -> None:
    @given(YAML.map("".join), st.booleans())
    def try_one(text: str, inside: bool) -> None:
        (tmp_path / "run_config.yaml").write_text("model: " * inside + text)
        refuses_or_reads(lambda: runconfig.model_of(tmp_path / "run_config.yaml"))

    fuzz(try_one, 300)


def test_trackers(tmp_path: Path, fuzz: Any) -> None:
    @given(
        st.one_of(st.binary(max_size=30), st.text("0123456789 \n-.²٣", max_size=30).map(str.encode))
    )
    def try_one(data: bytes) -> None:
        (tmp_path / folder.TRACKER).write_bytes(data)
        refuses_or_reads(lambda: folder.iteration_folder(tmp_path))

    fuzz(try_one, 200)
