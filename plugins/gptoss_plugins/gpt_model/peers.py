"""Noticing that another rank is gone: torch's collectives would wait for it, over NCCL for ten minutes.

Every rank says in torch's store, once a second, that it is there. A thread reads what the others say, and
ends this process with one sentence for all ranks when one of them is gone, whatever the main thread is
waiting for. Likewise a rank that fails says so, and the others end without a word: it told its reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from gptoss_convert.errors import ConvertError, choose
from gptoss_plugins.gpt_model.store import Words
from gptoss_plugins.gpt_model.termination import Termination

_BEAT = 1.0  # seconds
_SILENCE = 20  # of our beats without one of theirs; torchrun kills the others after 30 seconds
_LEAVING = 10.0  # seconds that a rank which failed may take to end
_MEETING = 300.0  # seconds that ranks may start apart: imports from a slow file system take minutes
_NOTICE = 10.0  # seconds until we say whom we wait for
_POLL = 0.05  # seconds
_DONE, _FAILED = "done", "failed"
_OF_RANKS = ("gloo", "nccl", "connection", "socket", "peer", "store")  # in what torch says then


class _Word(NamedTuple):
    """What another rank said last, and how many of our beats ago."""

    said: str
    age: int


class Peers:
    """The other ranks of this launch, watched until :meth:`close`. Made in the main thread."""

    def __init__(self, rank: int, world: int, *, resumes: bool = False) -> None:
        """Connect.

        Args:
            rank: this one.
            world: how many there are.
            resumes: whether the same command, run again, goes on from what was saved.

        Raises:
            ConvertError: rank 0 cannot be reached, or does not start.

        """
        self._rank = rank
        self._resumes = resumes
        self._others = {other: _Word("", 0) for other in range(world) if other != rank}
        self._machine = _machine()
        self._closed, self._left = threading.Event(), threading.Event()
        self._last = _DONE
        self._started, self._has_noticed = time.monotonic(), False
        self._end_of_main = Termination()
        self._words = Words(rank, lambda: self._be_patient([0]))
        self._holds_store = rank == 0 and not self._words.is_with_launcher
        self._beat(0)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        if not (self._holds_store or self._words.is_with_launcher):
            threading.Thread(target=self._watch_store, name="store", daemon=True).start()

    def meet(self) -> None:
        """Wait until all ranks are there, and say for whom. Ctrl-C ends it; torch would not hear it.

        Raises:
            ConvertError: one does not start.

        """
        missing = list(self._others)
        while missing := self._silent(missing):
            self._be_patient(missing)
            time.sleep(_POLL)

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank ends, before they wait for it.

        Raises:
            SystemExit: another rank has told a reason already.

        """
        if _is_of_ranks(error):  # so another one is the reason, and will be noticed
            time.sleep(_BEAT * (_SILENCE + 5))
        first = True
        with contextlib.suppress(RuntimeError):
            first = self._words.is_first("told")
            self._closed.set()  # the next beat would be in place of it
            self._thread.join()
            self._last = _FAILED
            self._words.write(self._rank, _FAILED)
        if self._holds_store:  # it goes with this rank, and the others have to read that
            time.sleep(2 * _BEAT)
        latest = threading.Timer(_LEAVING, os._exit, [1])
        latest.daemon = True
        latest.start()
        if not first and "--debug" not in sys.argv:
            self._let_the_first_tell()
            code = getattr(error, "exit_code", 1)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else code) from error
        choose(error)

    def close(self) -> None:
        """This rank needs the others no more."""
        self._closed.set()
        self._thread.join()
        if self._last == _DONE:  # one that fails tells why, whatever the launcher says
            self._end_of_main.close()
        with contextlib.suppress(RuntimeError):
            self._words.write(self._rank, self._last)
            if self._holds_store:  # let the others read that before it goes
                self._see_others_off()
        self._left.set()

    def _let_the_first_tell(self) -> None:
        """When this process ends, torchrun sends SIGTERM to the one that tells the reason."""
        latest = time.monotonic() + _LEAVING / 2
        while time.monotonic() < latest and not self._end_of_main.came():
            time.sleep(_POLL)

    def _see_others_off(self) -> None:
        latest = time.monotonic() + 2 * _BEAT
        while time.monotonic() < latest and any(
            self._words.read(other) not in (_DONE, _FAILED) for other in self._others
        ):
            time.sleep(_POLL)

    def _silent(self, ranks: list[int]) -> list[int]:
        """Those that have not said a word yet."""
        try:
            return [rank for rank in ranks if not self._words.read(rank)]
        except RuntimeError:  # the watch will end it
            return ranks

    def _be_patient(self, missing: list[int]) -> None:
        """Called while ranks are missing.

        Raises:
            ConvertError: it takes too long, or somebody ends it.

        """
        some, have = ("rank", "has") if len(missing) == 1 else ("ranks", "have")
        who, world = f"{some} {', '.join(map(str, missing))}", len(self._others) + 1
        waited = time.monotonic() - self._started
        if self._end_of_main.came():
            raise ConvertError(
                f"ended by SIGTERM before {who} of {world} had started; if you did not send it, a rank "
                f"or its machine failed, and the launcher's report says which"
            )
        if waited > _MEETING:
            raise ConvertError(
                f"{who} of {world} {have} not started within {_MEETING:.0f} seconds; see why in the "
                f"output of that process, and start all of them again"
            )
        if waited > _NOTICE and not self._has_noticed:
            self._has_noticed = True
            if 0 in missing or self._words.is_first("noticed"):
                print(f"waiting for {who} of {world} to start", file=sys.stderr, flush=True)

    def _beat(self, number: int) -> None:
        self._words.write(self._rank, f"{self._machine} {os.getpid()} {number}")

    def _watch(self) -> None:
        beat = 0
        while not self._closed.wait(_BEAT):
            beat += 1
            try:
                self._beat(beat)
                gone = self._gone()
            except RuntimeError:
                if not self._is_store_missed():
                    return
                self._end_without_store()
            else:
                if gone is not None and not self._closed.is_set():
                    self._end(f"rank {gone}", speaks=self._is_first_to_tell())
            self._end_of_main.look()

    def _gone(self) -> int | None:
        """A rank that is."""
        for rank, before in self._others.items():
            said = self._words.read(rank)
            age = before.age + 1 if said == before.said else 0
            self._others[rank] = _Word(said, age)
            if said == _FAILED:
                self._leave()
            if said in ("", _DONE):
                continue
            if age > _SILENCE or (age and _has_ended(said, self._machine)):
                return rank
        return None

    def _watch_store(self) -> None:
        """The store does not even fail while the rank that holds it stands still."""
        ages: dict[object, int] = {}
        while not self._left.wait(_BEAT):
            ages = {question: ages.get(question, 0) + 1 for question in self._words.unanswered()}
            if max(ages.values(), default=0) > _SILENCE:
                self._end_without_store()

    def _is_store_missed(self) -> bool:
        """Whether the store has gone before its time: rank 0 may be done, or this one soon."""
        if not self._words.is_with_launcher and self._others[0].said == _DONE:
            return False
        return not self._closed.wait(5 * _BEAT)

    def _end_without_store(self) -> None:
        """Who holds it is gone, and the others cannot be asked who tells: the first one does."""
        with_launcher = self._words.is_with_launcher
        alive = [r for r, word in self._others.items() if word.said not in ("", _DONE)]
        tells = min((r for r in alive if r or with_launcher), default=self._rank)
        self._end("the launcher" if with_launcher else "rank 0", speaks=self._rank <= tells)

    def _is_first_to_tell(self) -> bool:
        try:
            return self._words.is_first("told")
        except RuntimeError:
            return True

    def _end(self, who: str, *, speaks: bool) -> None:
        saved = "what was saved before is whole: " if self._resumes else ""
        to_go_on = " to go on from there" if self._resumes else ""
        if speaks:
            print(
                f"error: {who} is gone (killed, out of memory, or its machine failed), so all ranks "
                f"end; {saved}run the same command again{to_go_on}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    def _leave(self) -> None:
        """Give the main thread time to end by itself; another rank tells why."""
        self._closed.wait(_LEAVING)
        if not self._closed.is_set():
            os._exit(1)


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
