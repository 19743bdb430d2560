"""The torch_dist format against torch.distributed.checkpoint itself, in both directions."""

import io
import itertools
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gptoss_convert import Shard, TensorSpec
from gptoss_convert.blockio import BlockReader
from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.errors import CheckpointError
from gptoss_convert.plan import Output
from gptoss_plugins.megatron import keys, metadata, safe_pickle
from gptoss_plugins.megatron.source import TorchDistSource
from gptoss_plugins.megatron.torchzip import Frame, read_item


def framed(tensor: torch.Tensor, dtype: str) -> bytes:
    frame = Frame(TensorSpec(tuple(tensor.shape), dtype))
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert frame.data_bytes == len(data)
    item = frame.head + data + frame.tail
    assert len(item) == frame.nbytes
    return item


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4), st.sampled_from(["BF16", "F16", "F32", "F64"]))
def test_torch_loads_what_we_frame(shape: list[int], dtype: str) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch_dtype(dtype))
    loaded = torch.load(io.BytesIO(framed(tensor, dtype)), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert loaded.shape == tensor.shape
    assert loaded.is_contiguous()
    assert torch.equal(loaded, tensor)


def test_framed_data_is_aligned_and_independent_of_time() -> None:
    frame = Frame(TensorSpec((3, 5), "BF16"))
    assert len(frame.head) % 64 == 0
    assert frame.head == Frame(TensorSpec((3, 5), "BF16")).head
    names = zipfile.ZipFile(io.BytesIO(framed(torch.zeros(3, 5).bfloat16(), "BF16"))).namelist()
    assert names == ["archive/data.pkl", "archive/byteorder", "archive/version", "archive/data/0"]


@pytest.mark.parametrize("crc", [True, False])
def test_we_read_what_torch_saves(tmp_path: Path, crc: bool) -> None:
    """Any strides, any offset in the storage, anywhere in a file."""
    base = torch.arange(60, dtype=torch.float32).view(3, 4, 5)
    for tensor in (base, base[1:], base.transpose(0, 2), base[:, 1:3, ::2], torch.tensor(2.5)):
        torch.serialization.set_crc32_options(crc)
        torch.save(tensor, item := io.BytesIO())
        torch.serialization.set_crc32_options(True)
        (tmp_path / "f").write_bytes(b"x" * 77 + item.getvalue() + b"y" * 9)
        found = read_item(BlockReader(tmp_path / "f"), 77, len(item.getvalue()))
        raw = torch.frombuffer(
            bytearray((tmp_path / "f").read_bytes()[found.start :][:240]), dtype=torch.uint8
        )
        raw = torch.cat([raw, torch.zeros(-raw.numel() % 4, dtype=torch.uint8)])
        assert found.dtype == "F32"
        assert torch.equal(raw.view(torch.float32).as_strided(found.shape, found.strides), tensor)


def test_torch_reads_our_metadata() -> None:
    spec = TensorSpec((2, 6), "BF16")
    chunks = tuple(
        metadata.StoredChunk((0, 3 * i), (2, 3), metadata.Stored(f"__{i}_0.distcp", 64 * i, 99))
        for i in range(2)
    )
    contents = metadata.Contents(
        {"a.weight": metadata.Tensor(spec, chunks)}, {"a._extra_state/shard_0_1": chunks[0].at}
    )
    theirs = pickle.loads(metadata.dump(contents))
    assert theirs.state_dict_metadata == {
        "a.weight": TensorStorageMetadata(
            TensorProperties(dtype=torch.bfloat16),
            torch.Size([2, 6]),
            [ChunkStorageMetadata(torch.Size([0, 3 * i]), torch.Size([2, 3])) for i in range(2)],
        ),
        "a._extra_state/shard_0_1": BytesStorageMetadata(),
    }
    info = theirs.storage_data[MetadataIndex("a.weight", (0, 3))]
    assert (info.relative_path, info.offset, info.length) == ("__1_0.distcp", 64, 99)


def save_with_torch(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """torch's own writer, and the mark by which megatron-core knows a checkpoint."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text("{}")


TENSORS = {
    "embedding.word_embeddings.weight": torch.randn(7, 4).bfloat16(),
    "decoder.layers.self_attention.linear_proj.bias": torch.randn(3, 4).bfloat16(),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": torch.randn(3, 2, 4, 5).bfloat16(),
    "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.randn(4),
    "scalar": torch.tensor(1.5),
}


@pytest.mark.filterwarnings("ignore")
def test_we_read_what_torch_writes_stacked(tmp_path: Path) -> None:
    save_with_torch(tmp_path / "c", TENSORS)
    source = TorchDistSource(tmp_path / "c")
    source.check()
    names = set(source.specs())
    assert "optimizer.state.exp_avg.decoder.final_layernorm.weight" not in names
    assert torch.equal(
        source.read("embedding.word_embeddings.weight"), TENSORS["embedding.word_embeddings.weight"]
    )
    assert source.read("embedding.word_embeddings.weight", slice(2, 5)).tolist() == (
        TENSORS["embedding.word_embeddings.weight"][2:5].tolist()
    )
    for layer in range(3):
        bias = source.read(f"decoder.layers.{layer}.self_attention.linear_proj.bias")
        assert torch.equal(bias, TENSORS["decoder.layers.self_attention.linear_proj.bias"][layer])
        fc2 = source.read(f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight{{E}}", slice(1, 2))
        want = TENSORS["decoder.layers.mlp.experts.experts.linear_fc2.weight"][layer, 1:2]
        assert torch.equal(fc2, want)
    assert source.read("scalar").item() == 1.5


@pytest.mark.filterwarnings("ignore")
def test_we_read_one_key_per_layer(tmp_path: Path) -> None:
    each = {
        f"decoder.layers.{n}.mlp.experts.experts.linear_fc1.bias": torch.randn(2, 6) for n in (0, 1)
    }
    save_with_torch(tmp_path / "c", each)
    source = TorchDistSource(tmp_path / "c")
    for n in (0, 1):
        assert torch.equal(
            source.read(f"decoder.layers.{n}.mlp.experts.linear_fc1.bias{{E}}"),
            each[f"decoder.layers.{n}.mlp.experts.experts.linear_fc1.bias"],
        )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_boxes_come_together_from_any_grid(tmp_path_factory, data) -> None:
    """Chunks cut anywhere along every axis; rows asked for anywhere."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), label="shape")
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(torch.float32)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes = [((), ())]
    for edges in cuts:
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in itertools.pairwise(edges)]
    folder = tmp_path_factory.mktemp("grid")
    blob, chunks = b"", []
    for offsets, sizes in boxes:
        part = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        item = framed(part, "F32")
        chunks.append(
            metadata.StoredChunk(offsets, sizes, metadata.Stored("f", len(blob), len(item)))
        )
        blob += item
    (folder / "f").write_bytes(blob)
    contents = metadata.Contents(
        {"x": metadata.Tensor(TensorSpec(tuple(shape), "F32"), tuple(chunks))}, {}
    )
    (folder / ".metadata").write_bytes(metadata.dump(contents))
    (folder / "metadata.json").write_text("{}")
    source = TorchDistSource(folder)
    assert torch.equal(source.read("x"), tensor)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    assert torch.equal(source.read("x", slice(start, stop)), tensor[start:stop])


@pytest.mark.parametrize(
    ("name", "key", "layer"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight", None),
        ("decoder.layers.12.mlp.router.bias", "decoder.layers.mlp.router.bias", 12),
        (
            "decoder.layers.3.mlp.experts.linear_fc1.weight{E}",
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            3,
        ),
    ],
)
def test_names_and_keys(name: str, key: str, layer: int | None) -> None:
    assert keys.place(name) == keys.Place(key, layer)
    assert keys.parameter(key, layer) == name


def test_grid_is_one_chunk_per_layer_expert_and_half() -> None:
    output = Output(
        "decoder.layers.1.mlp.experts.linear_fc1.weight{E}", TensorSpec((2, 6, 5), "BF16")
    )
    found = [(c.offsets, c.sizes) for c in keys.chunks(output, Shard.GATED)]
    assert found == [((1, e, h, 0), (1, 1, 3, 5)) for e in (0, 1) for h in (0, 3)]
    assert keys.global_shape(output, 4) == (4, 2, 6, 5)


def test_a_chunk_never_passes_what_a_zip_entry_can_hold() -> None:
    huge = Output("embedding.word_embeddings.weight", TensorSpec((300_000, 16_384), "BF16"))
    found = list(keys.chunks(huge, Shard.COLUMN))
    assert sum(c.sizes[0] for c in found) == 300_000
    assert max(c.sizes[0] for c in found) * 16_384 * 2 <= 1 << 31


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_executed(tmp_path: Path) -> None:
    for protocol in range(6):
        with pytest.raises(CheckpointError, match="which no checkpoint needs"):
            safe_pickle.load(pickle.dumps(Evil(tmp_path / "owned"), protocol), "here")
    with pytest.raises(CheckpointError, match=r"builtins\.eval"):
        safe_pickle.load(b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", "here")
    assert list(tmp_path.iterdir()) == []


def test_megatron_objects_become_inert() -> None:
    stand_in = safe_pickle.load(b"cmegatron.core.enums\nModelType\n(K\x01tR.", "here")
    assert isinstance(stand_in, safe_pickle.Inert)
    assert stand_in.arguments == (1,)


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", pickle.dumps({1: 2})[:-3], b"."])
def test_damaged_pickles_are_one_sentence(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="here: "):
        safe_pickle.load(data, "here")


@pytest.mark.filterwarnings("ignore")
def test_a_parameter_under_two_keys_is_refused(tmp_path: Path) -> None:
    name = "self_attention.linear_proj.bias"
    both = {f"decoder.layers.{name}": torch.ones(2, 4), f"decoder.layers.1.{name}": torch.zeros(4)}
    save_with_torch(tmp_path / "c", both)
    with pytest.raises(CheckpointError, match="is stored under"):
        TorchDistSource(tmp_path / "c")
