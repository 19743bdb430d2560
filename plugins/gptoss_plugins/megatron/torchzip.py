"""One tensor in the form ``torch.save`` gives it, written and read as a stream.

Such an item is a zip archive of stored (uncompressed) records: a pickle that rebuilds the tensor,
and its bytes. Written here byte by byte, so that data can flow through without ever being whole
in memory, the bytes do not depend on torch's version, and every checksum is right. Read here
without executing anything, so that part of an item can be read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import itemsize
from gptoss_convert.errors import CheckpointError
from gptoss_plugins.megatron.safe_pickle import TensorRecord, load_tensor_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_convert.blockio import BlockReader
    from gptoss_convert.types import TensorSpec

ALIGNMENT = 64  # of an item in its file, and of the data in the item, as torch.save aligns it
_ROOT = "archive/"
_STORAGE = {
    "BF16": "BFloat16Storage",
    "F16": "HalfStorage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
}
# Zip records (PKWARE APPNOTE 6.3): local header, data descriptor, central entry, end of directory.
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTOR = struct.Struct("<4sIII")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<2sH")
_SIZE_LATER, _UTF8 = 0x8, 0x800  # flags: checksum in a descriptor after the data; names in UTF-8
_DOS_DATE = 0x21  # 1 January 1980, the earliest there is: the bytes must not depend on the clock


@dataclass(frozen=True)
class _Record:
    name: bytes
    offset: int
    size: int
    checksum: int
    flags: int


class Frame:
    """The bytes around a tensor's data: ``head``, then the data, then ``tail(checksum)``.

    Args:
        spec: the tensor; its data must stay under 4 GiB.

    """

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._small: list[_Record] = []
        out = io.BytesIO()
        for name, data in (
            ("data.pkl", _rebuild_pickle(spec)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            self._small.append(_small_record(out, name, data))
        self._data_offset = out.tell()
        out.write(_local_header(self._data_record(0)))
        self.head = out.getvalue()

    @property
    def data_bytes(self) -> int:
        """Length of the tensor's data."""
        return self._spec.nbytes

    @property
    def nbytes(self) -> int:
        """Length of the whole item."""
        return len(self.head) + self._spec.nbytes + len(self.tail(0))

    def tail(self, checksum: int) -> bytes:
        """What follows the data, whose CRC-32 is ``checksum``."""
        records = [*self._small, self._data_record(checksum)]
        size = self._spec.nbytes
        descriptor = _DESCRIPTOR.pack(b"PK\7\10", checksum, size, size)
        directory = b"".join(map(_central_entry, records))
        start = len(self.head) + size + len(descriptor)
        end = _END.pack(b"PK\5\6", 0, 0, len(records), len(records), len(directory), start, 0)
        return descriptor + directory + end

    def _data_record(self, checksum: int) -> _Record:
        name = (_ROOT + "data/0").encode()
        return _Record(name, self._data_offset, self._spec.nbytes, checksum, _SIZE_LATER | _UTF8)


@lru_cache(maxsize=256)
def frame(spec: TensorSpec) -> Frame:
    """The frame of a tensor; a checkpoint has few different ones."""
    return Frame(spec)


def _small_record(out: io.BytesIO, name: str, data: bytes) -> _Record:
    record = _Record((_ROOT + name).encode(), out.tell(), len(data), zlib.crc32(data), _UTF8)
    out.write(_local_header(record))
    out.write(data)
    return record


def _local_header(record: _Record) -> bytes:
    """A header whose extra field pads the data behind it to ALIGNMENT, as torch.save does."""
    bare = record.offset + _LOCAL.size + len(record.name) + _EXTRA.size
    fill = -bare % ALIGNMENT
    later = record.flags & _SIZE_LATER
    crc, size = (0, 0) if later else (record.checksum, record.size)
    head = _LOCAL.pack(
        b"PK\3\4",
        20,
        record.flags,
        0,
        0,
        _DOS_DATE,
        crc,
        size,
        size,
        len(record.name),
        _EXTRA.size + fill,
    )
    return head + record.name + _EXTRA.pack(b"FB", fill) + bytes(fill)


def _central_entry(record: _Record) -> bytes:
    return (
        _CENTRAL.pack(
            b"PK\1\2",
            20,
            20,
            record.flags,
            0,
            0,
            _DOS_DATE,
            record.checksum,
            record.size,
            record.size,
            len(record.name),
            0,
            0,
            0,
            0,
            0,
            record.offset,
        )
        + record.name
    )


class _Storage:
    """Stands for the bytes of a tensor while its pickle is written."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec


class _Rebuilt:
    """Pickles as the call that rebuilds a contiguous tensor over a storage."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        arguments: tuple[Any, ...] = (
            _Storage(self.spec),
            0,
            self.spec.shape,
            strides(self.spec.shape),
            False,
            OrderedDict(),
        )
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        import torch

        if isinstance(obj, _Storage):
            kind = getattr(torch, _STORAGE[obj.spec.dtype])
            return ("storage", kind, "0", "cpu", obj.spec.numel)
        return None


def _rebuild_pickle(spec: TensorSpec) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_Rebuilt(spec))
    return out.getvalue()


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
        records = _directory(file, offset, length)
        (pickled,) = [r for name, r in records.items() if name.endswith("/data.pkl")]
        start, size = _stored(file, offset, pickled)
        record = load_tensor_record(file.peek(start, size), where)
        suffix = f"/data/{record.key}"
        (data,) = [r for name, r in records.items() if name.endswith(suffix)]
        start, size = _stored(file, offset, data)
        return _checked(record, start, size, where)
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


def _directory(file: BlockReader, offset: int, length: int) -> dict[str, tuple[int, int, int]]:
    """Record name -> (compression, size, offset of its local header), from the item's end."""
    tail = file.peek(offset + max(0, length - (1 << 16)), min(length, 1 << 16))
    end = tail.rindex(b"PK\5\6")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, end)
    at = len(tail) - length + start if start < 0xFFFFFFFF else end - size
    found = {}
    for _ in range(count):
        _, _, _, _flags, method, *_, packed, plain, name, extra, note, _, _, _, header = (
            _CENTRAL.unpack_from(tail, at)
        )
        text = tail[at + _CENTRAL.size :][:name].decode()
        plain, header = _wide(tail[at + _CENTRAL.size + name :][:extra], plain, packed, header)
        found[text] = (method, plain, header)
        at += _CENTRAL.size + name + extra + note
    return found


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


def _stored(file: BlockReader, offset: int, record: tuple[int, int, int]) -> tuple[int, int]:
    """(first byte in the file, size) of an uncompressed record."""
    method, size, header = record
    if method != 0:
        raise ValueError("a compressed record")
    fields = _LOCAL.unpack(file.peek(offset + header, _LOCAL.size))
    return offset + header + _LOCAL.size + fields[9] + fields[10], size
