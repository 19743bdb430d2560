"""A folder that appears whole or not at all.

Work happens in a sibling, ``.NAME.incomplete-KEY``; KEY stands for everything that decides the
result, so the same command finds its own unfinished work again and another command does not. One
rename puts the finished folder in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.blockio import sync_folder
from gptoss_convert.errors import (
    ConvertError,
    IncompleteError,
    NoCheckpointError,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def unfinished(target: Path) -> list[Path]:
    """Staging folders that stopped runs have left beside a target."""
    pattern = f".{glob.escape(target.name)}.incomplete-*"
    return sorted(target.absolute().parent.glob(pattern))


def require_checkpoint(path: Path) -> None:
    """Raise the clearest error there is unless ``path`` is a folder that can be listed."""
    if path.is_dir():
        try:
            os.listdir(path)
        except OSError as error:
            raise NoCheckpointError(
                f"{path}: cannot be read: {error.strerror}; check its permissions"
            ) from None
        return
    if unfinished(path):
        raise IncompleteError(
            f"{path}: its conversion did not finish; run the same command again to go on"
        )
    what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
    raise NoCheckpointError(f"{path}: {what}; give the folder of a checkpoint")


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    parents = (p for p in path.absolute().parents if p.is_dir())
    return next(parents, Path("/"))


class Staging:
    """The staging folder of one target.

    Args:
        target: the folder to appear.
        key: stands for all that decides the result.
        replaceable: whether a non-empty target may be replaced; None if the user did not ask for it.
        shared: whether other processes work on the same result.

    """

    def __init__(
        self,
        target: Path,
        key: str,
        replaceable: Callable[[Path], bool] | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self.target = Path(os.path.abspath(target))
        self._mark = self.target.parent / f".{self.target.name}.finished-{key[:16]}"
        self.folder = self.target.parent / f".{self.target.name}.incomplete-{key[:16]}"
        self._old = self.target.parent / f".{self.target.name}.replaced"
        self._replaceable = replaceable
        self._lock: int | None = None
        self._made: list[Path] = []

    @property
    def is_finished(self) -> bool:
        """Whether processes that shared the work have put this very result in place."""
        return self._shared and self._mark.exists() and self.target.is_dir()

    def check_target(self) -> None:
        """Refuse a target that is in use, before anything is read or written."""
        target = self.target
        if not target.name:
            raise UsageError(f"{target}: is no folder name to write to")
        here = Path.cwd()
        if target == here or target in here.parents:
            raise ConvertError(f"{target}: is where you are; choose another target")
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ConvertError(f"{target}: is not a folder; choose another target")
        if target.is_dir() and os.path.ismount(target):
            raise ConvertError(f"{target}: is a mount point; choose a folder inside it")
        self._refuse_to_replace()
        parent = next(p for p in target.parents if p.exists() or p.is_symlink())
        if not parent.is_dir():
            raise ConvertError(f"{parent}: is not a folder; choose another target")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConvertError(f"{parent}: cannot be written to; choose another target")

    def check_space(self, nbytes: int) -> None:
        """Raise ResourceError unless the file system has room for what is still to be written."""
        free = free_bytes(self.target)
        have = sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())
        if nbytes - have > free:
            raise ResourceError(
                f"{existing_parent(self.target)}: {human(nbytes - have)} are needed and "
                f"{human(free)} are free; make room or choose another target"
            )

    def open(self) -> bool:
        """Create the folder or take it up again; True if there was earlier work in it.

        Raises:
            ConvertError: if another run is writing to the same target.

        """
        self._made = [p for p in self.folder.parents if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder, self.target, shared=self._shared)
        for other in unfinished(self.target):
            if other != self.folder:
                with contextlib.suppress(FileNotFoundError):  # another of us was faster
                    lock = _lock(other, self.target)
                    shutil.rmtree(other, ignore_errors=self._shared)
                    os.close(lock)
        if not self._shared:
            self._remove_parts()
        return any(p.is_file() for p in self.folder.rglob("*"))

    def _remove_parts(self) -> None:
        for part in self.folder.rglob("*.part"):
            part.unlink()

    def _refuse_to_replace(self) -> None:
        target = self.target
        if not (target.is_dir() and any(target.iterdir())):
            return
        if self._replaceable is None:
            raise ConvertError(
                f"{target}: is not empty; choose another target, or say --overwrite if it holds a "
                f"checkpoint to replace"
            )
        if not self._replaceable(target):
            raise ConvertError(
                f"{target}: is not empty, and no checkpoint, which is all that --overwrite replaces; "
                f"choose another target"
            )

    def recover(self) -> None:
        """Undo a replacement that stopped between its two renames, or finish its clean-up.

        Raises:
            ConvertError: if the run that replaces is still at it.
        """
        if self._old.exists():
            lock = _lock(self._old, self.target)
            if self.target.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.target)
            os.close(lock)

    def publish(self) -> None:
        """Put the finished folder in place of the target.

        Raises:
            ConvertError: if the target came into use meanwhile.
        """
        self._remove_parts()
        sync_folder(self.folder)
        self._refuse_to_replace()
        for mark in self.target.parent.glob(f".{glob.escape(self.target.name)}.finished-*"):
            mark.unlink(missing_ok=True)
        if self._shared and not self.target.exists():
            self._mark.touch()  # before, so that no late process takes the target for a stranger's
        lock = None
        if self.target.is_dir():
            lock = _lock(self.target, self.target)
            self.target.rename(self._old)
        self.folder.rename(self.target)
        sync_folder(self.target.parent)
        if self._shared:
            self._mark.touch()
        if lock is not None:
            shutil.rmtree(self._old, ignore_errors=True)  # the next run cleans up what stays
            os.close(lock)
        self.release()

    def discard(self) -> None:
        """Remove the folder, if it is ours, with all work in it and the parents made for it."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        self.release()

    def release(self) -> None:
        """Let another run have the target."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path, target: Path, *, shared: bool = False) -> int:
    """Hold a folder for this process, or with others; the system lets go however they end."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConvertError(f"{target}: another run is writing to it; wait for it to end") from None
    return fd


def free_bytes(target: Path) -> int:
    """Free disk space where ``target`` would be, in bytes."""
    return shutil.disk_usage(existing_parent(target)).free


def human(nbytes: float) -> str:
    """``1_650_000_000`` -> ``1.65 GB`` (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
