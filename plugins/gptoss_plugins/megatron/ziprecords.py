"""Zip archives of stored (uncompressed) records, byte by byte (PKWARE APPNOTE 6.3).

That is what ``torch.save`` writes. Written here so that data can flow through without ever being
whole in memory and the bytes do not depend on torch's version; read without touching the data.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_convert.blockio import BlockReader

ALIGNMENT = 64  # of the data of a record, as torch.save aligns it
WIDE, MANY = 0xFFFFFFFF, 0xFFFF  # from here on 64-bit fields say how large, and how many records
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_WIDE_END = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_EXTRA = struct.Struct("<2sH")
_WIDE_EXTRA = b"\1\0"
_UTF8, _DESCRIPTOR_FOLLOWS = 0x800, 0x8  # flags
_DOS_DATE = 0x21  # 1 January 1980, the earliest there is: the bytes must not depend on the clock
_PLAIN, _WITH_WIDE = 20, 45  # version of the standard that a reader has to know
_TAIL = 1 << 16
_LARGEST_DIRECTORY = 64 << 20  # bytes; a tensor's entry takes a hundred


@dataclass(frozen=True)
class Record:
    """A record to write: where its header begins, how long its data is, and their CRC-32."""

    name: str
    offset: int
    size: int
    checksum: int = 0

    @property
    def path(self) -> bytes:
        """Its name in the archive; torch wants a folder around all of them, whatever its name."""
        return f"archive/{self.name}".encode()


def local_header(record: Record) -> bytes:
    """A header whose extra field pads the data behind it to ALIGNMENT, as torch.save does."""
    wide = _wide_extra([record.size, record.size] if record.size >= WIDE else [])
    bare = record.offset + _LOCAL.size + len(record.path) + len(wide) + _EXTRA.size
    fill = -bare % ALIGNMENT
    size = 0xFFFFFFFF if wide else record.size
    fixed = _LOCAL.pack(
        b"PK\3\4", _version(wide), _UTF8, 0, 0, _DOS_DATE, record.checksum,
        size, size, len(record.path), len(wide) + _EXTRA.size + fill,
    )  # fmt: skip
    return fixed + record.path + wide + _EXTRA.pack(b"FB", fill) + bytes(fill)


def _version(wide: bytes) -> int:
    return _WITH_WIDE if wide else _PLAIN


def _wide_extra(values: Sequence[int]) -> bytes:
    """The extra field of the values that do not fit into 32 bits; nothing if all do."""
    if not values:
        return b""
    return _EXTRA.pack(_WIDE_EXTRA, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def directory(records: Sequence[Record], start: int) -> bytes:
    """The central directory, which begins ``start`` bytes into the archive, and its end record."""
    entries = b"".join(map(_entry, records))
    count, end = len(records), b""
    if max(start, len(entries)) >= WIDE or count >= MANY:
        at = start + len(entries)
        rest = (
            _WIDE_END.size - 12,
            _WITH_WIDE,
            _WITH_WIDE,
            0,
            0,
            count,
            count,
            len(entries),
            start,
        )
        end = _WIDE_END.pack(b"PK\6\6", *rest) + _LOCATOR.pack(b"PK\6\7", 0, at, 1)
        few, size, begin = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
    else:
        few, size, begin = count, len(entries), start
    return entries + end + _END.pack(b"PK\5\6", 0, 0, few, few, size, begin, 0)


def _entry(record: Record) -> bytes:
    sizes = [record.size, record.size] if record.size >= WIDE else []
    offsets = [record.offset] if record.offset >= WIDE else []
    wide = _wide_extra(sizes + offsets)
    size = 0xFFFFFFFF if sizes else record.size
    header = 0xFFFFFFFF if offsets else record.offset
    fixed = _CENTRAL.pack(
        b"PK\1\2", _version(wide), _version(wide), _UTF8, 0, 0, _DOS_DATE, record.checksum,
        size, size, len(record.path), len(wide), 0, 0, 0, 0, header,
    )  # fmt: skip
    return fixed + record.path + wide


@dataclass(frozen=True)
class Entry:
    """A record of an archive being read, as the directory has it.

    Attributes:
        path: its name, folder and all.
        header: where its header begins in the file.
        flags: they say whether checksum and sizes follow the data.
        size: of the data.
        checksum: of the data; 0 if nobody computed it.
        end: where the next record, or the directory, begins.

    """

    path: bytes
    header: int
    flags: int
    size: int
    checksum: int
    end: int


class Archive:
    """A zip archive in a stretch of a file; only its directory is read at once.

    Raises:
        ValueError, struct.error: it is no such archive.

    """

    def __init__(self, file: BlockReader, offset: int, length: int) -> None:
        self._file = file
        listed = sorted(self._listed(offset, length), key=lambda entry: entry.header)
        ends = [entry.header for entry in listed[1:]] + [self._directory]
        self.entries = {
            entry.path.partition(b"/")[2].decode(): replace(entry, end=end)
            for entry, end in zip(listed, ends, strict=True)
        }
        if len(self.entries) != len(listed):
            raise ValueError("two records of one name")

    def _listed(self, offset: int, length: int) -> list[Entry]:
        """The directory's entries, from the end record on backwards."""
        tail = self._file.peek(offset + max(0, length - _TAIL), min(length, _TAIL))
        end = tail.rindex(b"PK\5\6")
        _, _, _, _, count, size, start, _ = _END.unpack_from(tail, end)
        if 0xFFFFFFFF in (size, start) or count == 0xFFFF:  # 64-bit end record before this one
            wide = tail.rindex(b"PK\6\6", 0, end)
            *_, count, size, start = _WIDE_END.unpack_from(tail, wide)
        self._directory = offset + start
        if start + size > length or size > _LARGEST_DIRECTORY:
            raise ValueError("a directory past its end")
        data, at, found = self._file.peek(self._directory, size), 0, []
        for _ in range(count):
            entry, at = _parsed(data, at, offset)
            found.append(entry)
        return found

    def start(self, entry: Entry) -> int:
        """Where the data of a record begins; its own header must not shift it by a single byte."""
        fixed = self._file.peek(entry.header, _LOCAL.size + len(entry.path))
        *_, name, extra = _LOCAL.unpack_from(fixed)
        start = entry.header + _LOCAL.size + name + extra
        between = entry.end - start - entry.size
        if fixed[_LOCAL.size :] != entry.path or name != len(entry.path):
            raise ValueError("a record whose header has another name")
        if between not in ((16, 24) if entry.flags & _DESCRIPTOR_FOLLOWS else (0,)):
            raise ValueError("a record that does not end where the next begins")
        return int(start)


def _parsed(data: bytes, at: int, offset: int) -> tuple[Entry, int]:
    """The entry that begins at byte ``at`` of the directory, and where the next one does."""
    _, _, _, flags, method, _, _, crc, packed, plain, name, extra, note, _, _, _, header = (
        _CENTRAL.unpack_from(data, at)
    )
    if method != 0:
        raise ValueError("a compressed record")
    named = at + _CENTRAL.size
    more = named + name
    plain, header = _widened(data[more : more + extra], plain, packed, header)
    if max(plain, header) >= 1 << 62:
        raise ValueError("a record past all ends")
    entry = Entry(data[named:more], offset + header, flags, plain, crc, 0)
    return entry, more + extra + note


def _widened(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int]:
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
