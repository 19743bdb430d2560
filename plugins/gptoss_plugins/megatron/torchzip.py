"""One tensor in the form ``torch.save`` gives it, written and read as a stream.

Such an item is a zip archive of stored (uncompressed) records: a pickle that rebuilds the tensor,
and its bytes. Written here byte by byte, so that data can flow through without ever being whole
in memory and the bytes do not depend on torch's version. Read here without executing anything, so
that part of an item can be read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import itemsize
from gptoss_convert.errors import CheckpointError
from gptoss_plugins.megatron.safe_pickle import TensorRecord, load_tensor_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_convert.blockio import BlockReader
    from gptoss_convert.types import TensorSpec

ALIGNMENT = 64  # of an item in its file, and of the data in the item, as torch.save aligns it
_STORAGE = {
    "BF16": "BFloat16Storage",
    "F16": "HalfStorage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
}
# Zip records (PKWARE APPNOTE 6.3): local header, central entry, end of directory.
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<2sH")
_UTF8, _DESCRIPTOR_FOLLOWS = 0x800, 0x8  # flags
_DOS_DATE = 0x21  # 1 January 1980, the earliest there is: the bytes must not depend on the clock


@dataclass(frozen=True)
class _Record:
    name: bytes
    offset: int
    size: int
    checksum: int


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
        records = []
        out = io.BytesIO()
        for name, data in (
            ("data.pkl", _rebuild_pickle(spec)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            record = _Record(_named(name), out.tell(), len(data), zlib.crc32(data))
            out.write(_local_header(record) + data)
            records.append(record)
        records.append(_Record(_named("data/0"), out.tell(), spec.nbytes, 0))
        out.write(_local_header(records[-1]))
        self.head = out.getvalue()
        self.tail = _directory(records, len(self.head) + spec.nbytes)
        self.data_bytes = spec.nbytes
        self.nbytes = len(self.head) + spec.nbytes + len(self.tail)


@lru_cache(maxsize=256)
def frame(spec: TensorSpec) -> Frame:
    """The frame of a tensor; a checkpoint has few different ones."""
    return Frame(spec)


def _named(name: str) -> bytes:
    return f"archive/{name}".encode()


def _local_header(record: _Record) -> bytes:
    """A header whose extra field pads the data behind it to ALIGNMENT, as torch.save does."""
    bare = record.offset + _LOCAL.size + len(record.name) + _EXTRA.size
    fill = -bare % ALIGNMENT
    lengths = (record.size, record.size, len(record.name), _EXTRA.size + fill)
    fixed = _LOCAL.pack(b"PK\3\4", 20, _UTF8, 0, 0, _DOS_DATE, record.checksum, *lengths)
    return fixed + record.name + _EXTRA.pack(b"FB", fill) + bytes(fill)


def _directory(records: Sequence[_Record], start: int) -> bytes:
    """The central directory, which begins ``start`` bytes into the item, and its end record."""
    entries = b"".join(
        _CENTRAL.pack(
            b"PK\1\2", 20, 20, _UTF8, 0, 0, _DOS_DATE, r.checksum, r.size, r.size, len(r.name),
            0, 0, 0, 0, 0, r.offset,
        )
        + r.name
        for r in records
    )  # fmt: skip
    count = len(records)
    return entries + _END.pack(b"PK\5\6", 0, 0, count, count, len(entries), start, 0)


def _rebuild_pickle(spec: TensorSpec) -> bytes:
    """The pickle torch.save writes for a contiguous tensor, opcode by opcode.

    ``torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``, where the
    storage is a persistent id. Written by hand so that planning needs no torch.
    """
    storage = (
        _text("storage")
        + _global("torch", _STORAGE[spec.dtype])
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
        records = _records(file, offset, length)
        (pickled,) = [r for r in records if r.name.endswith(b"/data.pkl")]
        rebuild = file.peek(pickled.start, pickled.size)
        if pickled.checksum not in (0, zlib.crc32(rebuild)):
            raise ValueError("its pickle's checksum is wrong")
        record = load_tensor_record(rebuild, where)
        suffix = f"/data/{record.key}".encode()
        (data,) = [r for r in records if r.name.endswith(suffix)]
        return _checked(record, data.start, data.size, where)
    except (ValueError, KeyError, struct.error) as error:
        raise CheckpointError(
            f"{where}: is no stored tensor ({error}); the file is damaged, fetch it again"
        ) from None


def _checked(record: TensorRecord, start: int, size: int, where: str) -> Item:
    """The item, if its tensor lies inside its storage."""
    last = sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
    bytes_needed = (record.offset + last + 1) * itemsize(record.dtype)
    if min((0, record.offset, *record.shape, *record.strides)) < 0 or bytes_needed > size:
        raise ValueError(f"a tensor {list(record.shape)} in {size} bytes")
    first = start + record.offset * itemsize(record.dtype)
    return Item(record.dtype, record.shape, record.strides, first)


@dataclass(frozen=True)
class _Entry:
    """A record of an item being read; ``start`` is the first byte of its data in the file."""

    name: bytes
    start: int
    size: int
    checksum: int


def _records(file: BlockReader, offset: int, length: int) -> list[_Entry]:
    """The records of an item, from the directory at its end, checked against their headers."""
    tail = file.peek(offset + max(0, length - (1 << 16)), min(length, 1 << 16))
    end = tail.rindex(b"PK\5\6")
    _, _, _, _, count, _, start, _ = _END.unpack_from(tail, end)
    if start == 0xFFFFFFFF:  # the 64-bit end record stands before the locator and this one
        wide = tail.rindex(b"PK\6\6", 0, end)
        count, _size, start = struct.unpack_from("<QQQ", tail, wide + 32)
    at = len(tail) - length + start
    listed = []
    directory = offset + length - len(tail) + at
    for _ in range(count):
        _, _, _, flags, method, _, _, crc, packed, plain, name, extra, note, _, _, _, header = (
            _CENTRAL.unpack_from(tail, at)
        )
        if method != 0:
            raise ValueError("a compressed record")
        text = tail[at + _CENTRAL.size :][:name]
        plain, header = _wide(tail[at + _CENTRAL.size + name :][:extra], plain, packed, header)
        listed.append((offset + header, flags, _Entry(text, 0, plain, crc)))
        at += _CENTRAL.size + name + extra + note
    listed.sort(key=lambda record: record[0])
    ends = [header for header, _, _ in listed[1:]] + [directory]
    return [_located(file, *record, end) for record, end in zip(listed, ends, strict=True)]


def _located(file: BlockReader, header: int, flags: int, entry: _Entry, end: int) -> _Entry:
    """Where the data of a record begins; its own header must not shift it by a single byte.

    Args:
        file: the file.
        header: where the record's header is in it.
        flags: from the directory; they say whether checksum and sizes follow the data.
        entry: the record as the directory has it.
        end: where the next record, or the directory, begins.
    """
    fixed = file.peek(header, _LOCAL.size + len(entry.name))
    *_, name, extra = _LOCAL.unpack_from(fixed)
    start = header + _LOCAL.size + name + extra
    between = end - start - entry.size
    if fixed[_LOCAL.size :] != entry.name or name != len(entry.name):
        raise ValueError("a record whose header has another name")
    if between not in ((16, 24) if flags & _DESCRIPTOR_FOLLOWS else (0,)):
        raise ValueError("a record that does not end where the next begins")
    return replace(entry, start=start)


def _wide(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int]:
    """Size and header offset, taken from the 64-bit field where the 32-bit ones are full."""
    wide = io.BytesIO()
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = io.BytesIO(extra[4 : 4 + size])
        extra = extra[4 + size :]

    def full(value: int) -> int:
        return int.from_bytes(wide.read(8), "little") if value == 0xFFFFFFFF else value

    plain = full(plain)
    full(packed)
    return plain, full(header)
