"""Files read and written in large aligned blocks, past the page cache where the file system allows.

Direct I/O is several times faster here than going through the page cache, and leaves no trace in
it; where it is refused (tmpfs, some network file systems) ordinary reads and writes take over.
"""

from __future__ import annotations

import errno
import os
import queue
import random
import threading
from typing import TYPE_CHECKING

from gptoss_convert.checksums import Summing, current_listener
from gptoss_convert.errors import CheckpointError
from gptoss_convert.scratch import PAGE, page_aligned, round_up
from gptoss_convert.transpose import copy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.checksums import Span
    from gptoss_convert.scratch import Scratch

SLOT = 6 << 20  # 2 MiB: 0.1 s more of CPU per GB; 8: export to MXFP4 passes 450 MiB
SLOTS = 2
WRITER_BYTES = SLOT * SLOTS
_DIRECT = getattr(os, "O_DIRECT", 0)
_CACHED_ONLY = getattr(os, "RWF_NOWAIT", 0)
_LOOKS = 8  # pages that are asked for, to find out whether a file is in the page cache


def _buffer(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def _row_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


class BlockReader:
    """Reads byte ranges of one file. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cached = os.open(path, os.O_RDONLY)
        try:
            self._direct = os.open(path, os.O_RDONLY | _DIRECT)
        except OSError:
            self._direct = os.dup(self._cached)
        if hasattr(os, "posix_fadvise"):  # a look at one page shall not fetch more of them
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        self._in_cache = self._look()

    def read(self, offset: int, nbytes: int, scratch: Scratch) -> Tensor:
        """``nbytes`` bytes at ``offset`` as a uint8 tensor in memory of ``scratch``.

        Raises:
            CheckpointError: if the file ends before that.

        """
        start = offset // PAGE * PAGE
        block = scratch.take(round_up(offset + nbytes) - start)
        wanted = offset + nbytes - start
        self.fill(_buffer(block), start, wanted)
        return block[offset - start : wanted]

    def fill(self, view: memoryview, start: int, wanted: int) -> None:
        """Fill whole pages of memory from byte ``start`` on, where a page of the file begins.

        Args:
            view: the memory; it begins on a page, too.
            start: first byte.
            wanted: how many bytes there have to be.

        Raises:
            CheckpointError: if the file ends before that.

        """
        got = self._from_cache(view, start) if self._in_cache else 0
        while got < wanted:
            reached, got = got, got // PAGE * PAGE
            count = self._past_cache(view[got:], start + got)
            if got + count <= reached:
                raise CheckpointError(
                    f"{self.path}: ends before byte {start + wanted}; the file is cut short, "
                    f"fetch it again"
                )
            got += count

    def peek(self, offset: int, nbytes: int) -> bytes:
        """A few bytes, by an ordinary read; fewer than asked for at the end of the file."""
        return os.pread(self._cached, nbytes, offset)

    def _look(self) -> bool:
        """Whether the page cache holds the file. Asking it costs a page wherever it does not, and
        for whole ranges it would read them ahead, to be read once more past it; so ask for a few
        pages, of the file's whole length, and elsewhere each time.
        """
        size = os.fstat(self._cached).st_size
        page = memoryview(bytearray(PAGE))
        places = (int(size * (i + random.random()) / _LOOKS) for i in range(_LOOKS))
        return bool(size) and all(self._from_cache(page, place) for place in places)

    def _from_cache(self, view: memoryview, offset: int) -> int:
        """Take what the page cache already holds."""
        if not _CACHED_ONLY:
            return 0
        try:
            return os.preadv(self._cached, [view], offset, _CACHED_ONLY)
        except OSError:  # nothing cached, or a file system that cannot tell
            return 0

    def _past_cache(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._direct, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.preadv(self._cached, [view], offset)

    def __del__(self) -> None:
        for name in ("_cached", "_direct"):
            if (fd := self.__dict__.get(name)) is not None:
                os.close(fd)


class BlockWriter:
    """Writes one file from front to back, then puts it in place durably.

    Bytes are gathered in a ring of aligned slots that a thread of its own writes out, so that
    making and writing overlap. The file stands under ``PATH.part`` until ``close``. That thread
    takes the checksums too, for the manifest: nobody reads the file a second time for them, and
    nobody may change it afterwards.

    Args:
        path: final name.
        nbytes: how long the file will be; space is reserved at once.
        tensors: where in it they will be, for a checksum of each.

    Attributes:
        position: bytes taken so far.

    """

    def __init__(self, path: Path, nbytes: int, tensors: Iterable[Span] = ()) -> None:
        self.position = 0
        self._listener = current_listener()
        self._sums = Summing(tensors) if self._listener else None
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._fd, self._closed = self._open(), False
        try:
            os.posix_fallocate(self._fd, 0, max(round_up(nbytes), PAGE))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):
                os.close(self._fd)
                self._part.unlink(missing_ok=True)
                raise
        self._slots = [page_aligned(SLOT) for _ in range(SLOTS)]
        self._views = [_buffer(slot) for slot in self._slots]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(SLOTS):
            self._free.put(index)
        self._full: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._slot = self._free.get()
        self._fill = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        try:
            return os.open(self._part, flags | _DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(self._part, flags, 0o644)

    def require(self, position: int, what: str) -> None:
        """Raise unless ``position`` is reached: a file with bytes in wrong places may well load."""
        if self.position != position:
            raise RuntimeError(f"{what} is due at byte {position}, and came at {self.position}")

    def append_bytes(self, data: bytes | memoryview) -> None:
        """Take bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            count = min(SLOT - self._fill, len(view))
            self._views[self._slot][self._fill : self._fill + count] = view[:count]
            self._advance(count)
            view = view[count:]

    def append(self, tensor: Tensor) -> None:
        """Take a tensor's elements in row-major order, whatever its strides."""
        import torch

        if tensor.numel() == 1:  # contiguous by definition, with any strides
            self._append_flat(tensor.reshape(()).clone().view(1).view(torch.uint8))
        elif tensor.is_contiguous():
            self._append_flat(tensor.reshape(-1).view(torch.uint8))
        elif tensor.dim() == 1:
            self.append(tensor.contiguous())
        elif (size := _row_bytes(tensor)) > SLOT or self._fill % tensor.element_size():
            for part in tensor.unbind(0):
                self.append(part)
        else:
            self._append_rows(tensor, size)

    def _append_flat(self, data: Tensor) -> None:
        done = 0
        while done < data.numel():
            count = min(SLOT - self._fill, data.numel() - done)
            copy(self._room(count), data[done : done + count])
            self._advance(count)
            done += count

    def _append_rows(self, tensor: Tensor, row_bytes: int) -> None:
        """As many whole rows at a time as the slot has room for; a row across slots by itself."""
        done, rows = 0, tensor.shape[0]
        while done < rows:
            count = min((SLOT - self._fill) // row_bytes, rows - done)
            if count == 0:
                self.append(tensor[done].contiguous())
                done += 1
                continue
            part = tensor[done : done + count]
            copy(self._room(count * row_bytes).view(tensor.dtype).view(part.shape), part)
            self._advance(count * row_bytes)
            done += count

    def _room(self, count: int) -> Tensor:
        return self._slots[self._slot][self._fill : self._fill + count]

    def _advance(self, count: int) -> None:
        self._fill += count
        self.position += count
        if self._fill == SLOT:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._error:
            raise self._error
        self._full.put((self._slot, self._fill, self.position - self._fill))
        self._slot, self._fill = self._free.get(), 0

    def _drain(self) -> None:
        while (job := self._full.get()) is not None:
            slot, count, offset = job
            try:
                if self._error is None:
                    if self._sums:
                        self._sums.update(self._views[slot][:count])
                    self._write(self._views[slot][: round_up(count)], offset)
            except BaseException as error:
                self._error = error
            self._free.put(slot)

    def _write(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Write what is left, sync, and rename to the final name."""
        try:
            if self._fill:
                self._hand_over()
            self._stop()
            if self._error:
                raise self._error
            os.ftruncate(self._fd, self.position)
            os.fsync(self._fd)
            if self._listener and self._sums:
                self._listener(self._path, self._sums.total())
        except BaseException:
            self.abort()
            raise
        os.close(self._fd)
        self._closed = True
        self._part.rename(self._path)
        sync_folder(self._path.parent)

    def abort(self) -> None:
        """Leave nothing behind; harmless after ``close`` or another ``abort``."""
        self._stop()
        if not self._closed:
            os.close(self._fd)
            self._closed = True
        self._part.unlink(missing_ok=True)

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()
        self._slots, self._views = [], []  # at once, not when the collector comes around


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, tensors: Iterable[Span] = ()) -> None:
    """Write a small file durably, and its checksums down where a conversion keeps them."""
    if listener := current_listener():
        sums = Summing(tensors)
        sums.update(data)
        listener(path, sums.total())
    write_note(path, data)


def write_note(path: Path, data: bytes) -> None:
    """Write a small file durably: beside its final name, synced, then renamed."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_folder(path.parent)
