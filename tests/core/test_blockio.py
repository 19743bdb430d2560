"""Block I/O: the bytes that went in come out, whatever their shape, strides and alignment."""

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import blockio
from gptoss_convert.blockio import SLOT, BlockReader, BlockWriter, write_file
from gptoss_convert.errors import CheckpointError
from gptoss_convert.scratch import PAGE, Scratch


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()  # row-major, whatever the strides


STRIDED = [
    noise(5, 7),
    noise(5, 7).T,
    noise(4, 3, 6).transpose(0, 2),
    noise(40)[::3],
    noise(3, 8, 5)[:, ::2].transpose(1, 2),
    noise(2300, 2900).T,  # longer than a slot, rows across slots
    noise(3, SLOT // 2 + 5)[:, 1:],  # one row is longer than a slot
    noise(1, 1)[0, 0],
    noise(3, 4)[1:2, 2:3],  # one element, strides of a larger tensor
    noise(7)[3::9],
]


@pytest.mark.parametrize("lead", [0, 1, 2, SLOT - 3], ids=["0", "1", "2", "near-slot-end"])
def test_writer_puts_row_major_bytes(tmp_path, lead: int) -> None:
    path = tmp_path / "file"
    want = os.urandom(lead)
    writer = BlockWriter(path, 1)  # a wrong estimate only costs speed
    writer.append_bytes(want)
    for tensor in STRIDED:
        writer.append(tensor)
        want += raw(tensor)
    assert writer.position == len(want)
    assert not path.exists()
    writer.close()
    assert path.read_bytes() == want
    assert os.listdir(tmp_path) == ["file"]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40_000), st.integers(1, 20_000))
def test_reader_reads_any_range(tmp_path_factory, start: int, count: int) -> None:
    path = tmp_path_factory.mktemp("r") / "file"
    data = bytes(range(256)) * 250  # 64,000 bytes, no multiple of a page
    path.write_bytes(data)
    scratch = Scratch()
    reader = BlockReader(path)
    if start + count > len(data):
        with pytest.raises(CheckpointError, match="ends before byte"):
            reader.read(start, count, scratch)
    else:
        assert reader.read(start, count, scratch).numpy().tobytes() == data[start : start + count]


def test_reader_without_direct_io_and_without_cache_hints(tmp_path, monkeypatch) -> None:
    """The fallbacks read the same bytes: neither flag is there on every system."""
    monkeypatch.setattr(blockio, "_DIRECT", 0)
    monkeypatch.setattr(blockio, "_CACHED_ONLY", 0)
    (tmp_path / "file").write_bytes(data := os.urandom(3 * PAGE + 5))
    assert (
        BlockReader(tmp_path / "file").read(7, 2 * PAGE, Scratch()).numpy().tobytes()
        == (data[7 : 7 + 2 * PAGE])
    )


def test_uncached_file_is_read_directly(tmp_path) -> None:
    path = tmp_path / "file"
    data = os.urandom(5 * PAGE + 11)
    write_file(path, data)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    got = BlockReader(path).read(PAGE - 1, 4 * PAGE, Scratch())
    assert got.numpy().tobytes() == data[PAGE - 1 : 5 * PAGE - 1]


def test_a_failing_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = BlockWriter(tmp_path / "file", SLOT * 9)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - any of the calls may see it
        for _ in range(9):
            writer.append(noise(SLOT // 2))
        writer.close()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_abort_leaves_nothing(tmp_path) -> None:
    writer = BlockWriter(tmp_path / "file", 10)
    writer.append(noise(100))
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_scratch_is_aligned_disjoint_and_reused() -> None:
    scratch = Scratch()
    for _ in range(3):
        taken = [scratch.take(n).fill_(i) for i, n in enumerate((1, PAGE, 3 * PAGE + 1, 100))]
        assert all(t.data_ptr() % PAGE == 0 for t in taken)
        assert [t.unique().tolist() for t in taken] == [[0], [1], [2], [3]]
        scratch.reset()
    first = scratch.take(5 * PAGE).data_ptr()
    scratch.reset()
    assert scratch.take(5 * PAGE).data_ptr() == first


def test_scratch_mark_and_release() -> None:
    scratch = Scratch()
    scratch.take(10 * PAGE)
    scratch.reset()
    kept = scratch.take(PAGE).fill_(7)
    mark = scratch.mark()
    inner = scratch.take(PAGE).data_ptr()
    scratch.release(mark)
    assert scratch.take(PAGE).fill_(9).data_ptr() == inner
    assert kept.unique().tolist() == [7]


def test_scratch_grows_to_what_was_held_at_once() -> None:
    sizes = []

    def allocate(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    scratch = Scratch(allocate)
    kept = scratch.take(4 * PAGE).fill_(7)
    mark = scratch.mark()
    for _ in range(3):
        scratch.take(2 * PAGE).fill_(9)
        scratch.release(mark)
    assert kept.unique().tolist() == [7]
    scratch.reset()
    assert sizes == [4 * PAGE, 2 * PAGE, 6 * PAGE]
    scratch.take(9 * PAGE)  # instead of the block that is not in use
    scratch.reset()
    assert sizes[3:] == [9 * PAGE]


def test_a_writer_that_dies_is_never_taken_for_one_that_wrote(tmp_path, monkeypatch) -> None:
    """Whatever the thread fails with: no file of zeros, no wait for ever."""

    def die(*_: object) -> int:
        raise ValueError("something nobody thought of")

    writer = BlockWriter(tmp_path / "file", 1)
    monkeypatch.setattr(os, "pwrite", die)
    with pytest.raises(ValueError, match="nobody thought of"):  # noqa: PT012
        for _ in range(9):
            writer.append(noise(SLOT // 2))
        writer.close()
    writer.abort()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 5000, PAGE])
def test_a_file_that_ends_early_is_no_endless_loop(tmp_path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="ends before byte 6000"):
        BlockReader(tmp_path / "file").read(0, 6000, Scratch())
