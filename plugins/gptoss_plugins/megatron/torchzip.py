"""One tensor in the form ``torch.save`` gives it, written and read as a stream.

Such an item is a zip archive: a pickle that rebuilds the tensor, and its bytes. Read without
executing anything, so that part of an item can be read.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import itemsize, torch_dtype
from gptoss_convert.errors import CheckpointError
from gptoss_plugins.megatron.pickle_limits import LONGEST
from gptoss_plugins.megatron.safe_pickle import TensorRecord, load, load_tensor_record
from gptoss_plugins.megatron.ziprecords import (
    ALIGNMENT,
    Archive,
    Record,
    directory,
    local_header,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gptoss_convert.blockio import BlockReader
    from gptoss_convert.scratch import Scratch
    from gptoss_convert.types import TensorSpec

__all__ = ["ALIGNMENT", "Frame", "Item", "frame", "read_item", "view"]
# What torch.save wrote before it wrote archives: a pickle of this number comes first.
_OLD_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
DAMAGED = (ValueError, KeyError, struct.error, OverflowError)
STORAGE = {
    "BF16": "BFloat16Storage",
    "F16": "HalfStorage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
}
SMALL = (("byteorder", b"little"), ("version", b"3\n"))  # records of every torch.save file


def preamble(pickled: bytes) -> tuple[bytes, list[Record]]:
    """What a torch.save file begins with: everything but tensors; and the records that this is."""
    records, out = [], io.BytesIO()
    for name, data in (("data.pkl", pickled), *SMALL):
        record = Record(name, out.tell(), len(data), zlib.crc32(data))
        out.write(local_header(record) + data)
        records.append(record)
    return out.getvalue(), records


class Frame:
    """The bytes around a tensor's data.

    The data's checksum is left 0, as ``torch.serialization.set_crc32_options(False)`` leaves it:
    torch never checks it, and computing it costs as much as all the rest of a conversion.

    Args:
        spec: the tensor; its data must stay under 4 GiB.

    Attributes:
        head: what goes before the data.
        tail: what goes behind it.
        data_bytes: length of the data.
        nbytes: length of the whole item.
    """

    def __init__(self, spec: TensorSpec) -> None:
        start, records = preamble(_rebuild_pickle(spec))
        records.append(Record("data/0", len(start), spec.nbytes))
        self.head = start + local_header(records[-1])
        self.tail = directory(records, len(self.head) + spec.nbytes)
        self.data_bytes = spec.nbytes
        self.nbytes = len(self.head) + spec.nbytes + len(self.tail)


@lru_cache(maxsize=256)
def frame(spec: TensorSpec) -> Frame:
    """The frame of a tensor; a checkpoint has few different ones."""
    return Frame(spec)


def _rebuild_pickle(spec: TensorSpec) -> bytes:
    """The pickle torch.save writes for a contiguous tensor, opcode by opcode.

    ``torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``, where the
    storage is a persistent id. Written by hand so that planning needs no torch.
    """
    storage = (
        _text("storage")
        + _global("torch", STORAGE[spec.dtype])
        + b"".join((_text("0"), _text("cpu"), _integer(spec.numel)))
    )
    arguments = (
        _tuple(storage) + pickle.BINPERSID,
        _integer(0),
        _tuple(b"".join(map(_integer, spec.shape))),
        _tuple(b"".join(map(_integer, strides(spec.shape)))),
        pickle.NEWFALSE,
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )
    call = _global("torch._utils", "_rebuild_tensor_v2") + _tuple(b"".join(arguments))
    return pickle.PROTO + b"\2" + call + pickle.REDUCE + pickle.STOP


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _tuple(items: bytes) -> bytes:
    return pickle.MARK + items + pickle.TUPLE


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    found = [1]
    for size in reversed(shape[1:]):
        found.append(found[-1] * max(size, 1))
    return tuple(reversed(found))[: len(shape)] if shape else ()


@dataclass(frozen=True)
class Item:
    """A stored tensor: its type and strides (in elements), and where its first byte is."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


def read_item(file: BlockReader, offset: int, length: int) -> Item:
    """Look up a tensor item without reading its data.

    Args:
        file: the file it is in.
        offset: of the item in the file, in bytes.
        length: of the item.

    Raises:
        CheckpointError: it is no such item, or its pickle asks for more than a tensor.

    """
    where = f"{file.path} at byte {offset}"
    try:
        archive = open_archive(file, offset, length)
        record = load_tensor_record(read_pickle(file, archive), where)
        return locate(archive, record)
    except DAMAGED as error:
        raise CheckpointError(
            f"{where}: is no stored tensor ({error}); the file is damaged, fetch it again"
        ) from None


def read_object(file: BlockReader, offset: int, length: int, where: str) -> Any:
    """Unpickle the object of a ``torch.save`` archive; tensors in it stay TensorRecords.

    Args:
        file: the file it is in.
        offset: of the archive in the file, in bytes.
        length: of the archive.
        where: what it is, for the message.

    Raises:
        CheckpointError: it is no such archive, or its pickle asks for something not on the list.

    """
    try:
        pickled = read_pickle(file, open_archive(file, offset, length))
    except DAMAGED as error:
        raise CheckpointError(f"{where}: is no torch.save file ({error}); fetch it again") from None
    return load(pickled, where)


def open_archive(file: BlockReader, offset: int, length: int) -> Archive:
    """The archive in a stretch of a file.

    Raises:
        CheckpointError: it is of torch.save's older form, which is none.
        DAMAGED: it is no archive.

    """
    if file.peek(offset, len(_OLD_MAGIC)) == _OLD_MAGIC:
        raise CheckpointError(
            f"{file.path}: is of the form that torch.save had before 1.6, and no archive; load it "
            f"with torch where it is trusted, and save it again"
        )
    return Archive(file, offset, length)


def read_pickle(file: BlockReader, archive: Archive) -> bytes:
    """The pickle of a torch.save archive.

    Raises:
        DAMAGED: it is not there, or not whole.

    """
    entry = archive.entries["data.pkl"]
    if entry.size > LONGEST:
        raise ValueError(f"its pickle takes {entry.size:,} bytes")
    data = file.peek(archive.start(entry), entry.size)
    if entry.checksum not in (0, zlib.crc32(data)):
        raise ValueError("its pickle's checksum is wrong")
    return data


def locate(archive: Archive, record: TensorRecord) -> Item:
    """Where a tensor of an archive is.

    Raises:
        DAMAGED: it is not whole there.

    """
    entry = archive.entries[f"data/{record.key}"]
    last = sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
    bytes_needed = (record.offset + last + 1) * itemsize(record.dtype)
    least = min((0, record.offset, *record.shape, *record.strides))
    if least < 0 or bytes_needed > entry.size:
        raise ValueError(f"a tensor {list(record.shape)} in {entry.size} bytes")
    first = archive.start(entry) + record.offset * itemsize(record.dtype)
    return Item(record.dtype, record.shape, record.strides, first)


def view(
    file: BlockReader, item: Item, offsets: Sequence[int], sizes: Sequence[int], scratch: Scratch
) -> Tensor:
    """A box of a stored tensor: the bytes from its first to its last element, then a view."""
    width = itemsize(item.dtype)
    first = sum(i * s for i, s in zip(offsets, item.strides, strict=True))
    last = first + sum((n - 1) * s for n, s in zip(sizes, item.strides, strict=True))
    data = file.read(item.start + first * width, (last - first + 1) * width, scratch)
    if data.storage_offset() % width:
        data = scratch.copy(data)
    flat = data.view(torch_dtype(item.dtype))
    if item.strides == strides(item.shape) and math.prod(sizes) == flat.numel():
        return flat.view(tuple(sizes))
    return flat.as_strided(tuple(sizes), item.strides, flat.storage_offset())
