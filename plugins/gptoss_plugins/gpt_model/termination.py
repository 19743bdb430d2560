"""SIGTERM, held back until it is known why it came."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from gptoss_convert.sigterm import end_by_sigterm

_PATIENCE = 3  # beats after SIGTERM


class Termination:
    """SIGTERM, which ends a process at once unless it says otherwise, waits until a reason was told:
    launchers send it to the others when a rank is gone. The main thread may be waiting in a
    collective, where Python's own handlers do not run, so this leaves it to the watching thread.
    """

    def __init__(self) -> None:
        self._waited: int | None = None
        self._handler = signal.getsignal(signal.SIGTERM)
        self._is_ours = self._handler in (signal.SIG_DFL, end_by_sigterm)
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
        """Whether it did, and nobody else deals with it: a training saves, and ends by itself."""
        if self._is_ours and self._waited is None:
            with contextlib.suppress(BlockingIOError):
                if signal.SIGTERM in self._reader.recv(4096) and self._has_handler():
                    self._waited = 0
        return self._waited is not None and self._has_handler()

    def look(self) -> None:
        """End the process, as SIGTERM does, if it came a while ago. To be called at every beat."""
        if self.came():
            self._waited = (self._waited or 0) + 1
            if self._waited > _PATIENCE:
                end_by_sigterm()

    def _has_handler(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._nothing

    def close(self) -> None:
        """As it was."""
        if self._is_ours:
            signal.set_wakeup_fd(self._before)
            if self._has_handler():
                signal.signal(signal.SIGTERM, self._handler)
            if self._waited is not None:
                os.kill(os.getpid(), signal.SIGTERM)
            self._reader.close()
            self._writer.close()
