"""Noticing that another rank is gone: torch's collectives would wait for it, over NCCL for ten minutes.

Every rank says in torch's store, once a second, that it is there. A thread reads what the others say, and
ends this process with one sentence for all ranks when one of them is gone, whatever the main thread is
waiting for. Likewise a rank that fails says so, and the others end without a word: it told its reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from gptoss_convert.errors import ConvertError

torch_dist: Any = dist  # whose stores are public, but not in the stubs
_BEAT = 1.0  # seconds
_SILENCE = 20  # of our beats without one of theirs; torchrun kills the others after 30 seconds
_PATIENCE = 3  # beats after SIGTERM
_LEAVING = 10.0  # seconds that a rank which failed may take to end
_DONE, _FAILED = "done", "failed"
_OF_RANKS = ("gloo", "nccl", "connection", "socket", "peer", "store")  # in what torch says then


class _Word(NamedTuple):
    """What another rank said last, and how many of our beats ago."""

    said: str
    age: int


class Peers:
    """The other ranks of this launch, watched until :meth:`close`. Made in the main thread."""

    def __init__(self) -> None:
        self._rank, world = dist.get_rank(), dist.get_world_size()
        self._others = {rank: _Word("", 0) for rank in range(world) if rank != self._rank}
        self._machine = _machine()
        self._closed = threading.Event()
        self._last = _DONE
        self._store = _store()
        self._beat(0)
        self._end_of_main = _Termination()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank ends, before they wait for it.

        Raises:
            SystemExit: another rank has told a reason already.

        """
        if _is_of_ranks(error):  # so another one is the reason, and will be noticed
            time.sleep(_BEAT * (_SILENCE + 5))
        first = True
        with contextlib.suppress(RuntimeError):
            first = self._store.add("told", 1) == 1
            self._closed.set()  # the next beat would be in place of it
            self._thread.join()
            self._last = _FAILED
            self._say(_FAILED)
        if self._rank == 0:  # the store may go with this rank, and the others have to read that
            time.sleep(2 * _BEAT)
        latest = threading.Timer(_LEAVING, os._exit, [1])
        latest.daemon = True
        latest.start()
        if not first and "--debug" not in sys.argv:
            code = getattr(error, "exit_code", 1)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else code) from error

    def close(self) -> None:
        """This rank needs the others no more."""
        self._closed.set()
        self._thread.join()
        self._end_of_main.close()
        with contextlib.suppress(RuntimeError):
            self._say(self._last)

    def _beat(self, number: int) -> None:
        self._say(f"{self._machine} {os.getpid()} {number}")

    def _say(self, what: str) -> None:
        self._store.set(str(self._rank), what)

    def _watch(self) -> None:
        beat = 0
        while not self._closed.wait(_BEAT):
            beat += 1
            try:
                self._beat(beat)
                gone = self._gone()
            except RuntimeError:  # the store is with the launcher, or with rank 0
                if self._closed.wait(5 * _BEAT):
                    return
                gone = 0
            if gone is not None and not self._closed.is_set():
                self._end(gone)
            self._end_of_main.look()

    def _gone(self) -> int | None:
        """A rank that is."""
        for rank, before in self._others.items():
            key = str(rank)
            said = self._store.get(key).decode() if self._store.check([key]) else ""
            age = before.age + 1 if said == before.said else 0
            self._others[rank] = _Word(said, age)
            if said == _FAILED:
                self._leave()
            if said != _DONE and (age > _SILENCE or (age and _has_ended(said, self._machine))):
                return rank
        return None

    def _end(self, rank: int) -> None:
        told = 1
        with contextlib.suppress(RuntimeError):
            told = self._store.add("told", 1)
        if told == 1:
            print(
                f"error: rank {rank} is gone (killed, out of memory, or its machine failed), so all ranks "
                f"end; what was saved before is whole: run the same command again to go on from there",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    def _leave(self) -> None:
        """Give the main thread time to end by itself; another rank tells why."""
        self._closed.wait(_LEAVING)
        if not self._closed.is_set():
            os._exit(1)


class _Termination:
    """SIGTERM, which ends a process at once unless it says otherwise, waits until a reason was told:
    launchers send it to the others when a rank is gone. The main thread may be waiting in a
    collective, where Python's own handlers do not run, so this leaves it to the watching thread.
    """

    def __init__(self) -> None:
        self._waited: int | None = None
        self._is_ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if not self._is_ours:
            return
        self._reader, writer = socket.socketpair()
        self._writer = writer
        for end in (self._reader, writer):
            end.setblocking(False)
        signal.signal(signal.SIGTERM, self._nothing)
        self._before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def _nothing(self, *_: object) -> None:
        """What Python calls later."""

    def look(self) -> None:
        """End the process as SIGTERM does, if it came a while ago and nobody else deals with it."""
        if not self._is_ours:
            return
        came = False
        with contextlib.suppress(BlockingIOError):
            came = signal.SIGTERM in self._reader.recv(4096)
        if signal.getsignal(signal.SIGTERM) != self._nothing:
            return  # a training saves, and ends by itself
        if came and self._waited is None:
            self._waited = 0
        if self._waited is None:
            return
        self._waited += 1
        if self._waited > _PATIENCE:
            os._exit(128 + signal.SIGTERM)

    def close(self) -> None:
        """As it was."""
        if self._is_ours:
            signal.set_wakeup_fd(self._before)
            if signal.getsignal(signal.SIGTERM) == self._nothing:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._waited is not None:
                os.kill(os.getpid(), signal.SIGTERM)
            self._reader.close()
            self._writer.close()


def _machine() -> str:
    """What processes that see each other in /proc have alike, and no others; "" where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_ended(said: str, machine: str) -> bool:
    """Whether a process of this machine is not there any more, by what it said last."""
    theirs, _, rest = said.partition(" ")
    if not theirs or theirs != machine:
        return False  # its silence has to do
    try:
        stat = Path("/proc", rest.partition(" ")[0], "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "ZX"


def _store() -> Any:
    """A connection of our own: torch's is busy while it waits."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch_dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
    launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch_dist.PrefixStore(f"gptoss-convert/{launch}", store)


def _is_of_ranks(error: BaseException | None) -> bool:
    """Whether torch says that it lost another rank, here or in what this was raised from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        text = str(error).lower()
        if not isinstance(error, ConvertError) and any(word in text for word in _OF_RANKS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False
