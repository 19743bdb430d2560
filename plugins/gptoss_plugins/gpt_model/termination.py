"""SIGTERM, held back until it is known why it came."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

_PATIENCE = 3  # beats after SIGTERM


class Termination:
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

    def came(self) -> bool:
        """Whether it did."""
        if self._is_ours and self._waited is None:
            with contextlib.suppress(BlockingIOError):
                if signal.SIGTERM in self._reader.recv(4096):
                    self._waited = 0
        return self._waited is not None

    def look(self) -> None:
        """End the process as SIGTERM does, if it came a while ago and nobody else deals with it.
        To be called at every beat.
        """
        if not self.came() or self._waited is None:
            return
        if signal.getsignal(signal.SIGTERM) != self._nothing:
            return  # a training saves, and ends by itself
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
