"""SIGTERM, which launchers send to all processes when they lose one: one of those left says so."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import NoReturn

_CODE = 128 + signal.SIGTERM
_ALL_HAVE_TRIED = 1.0  # seconds


def tell_sigterm() -> None:
    """From now on."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_by_sigterm)


def end_by_sigterm(*_: object) -> NoReturn:
    """End at once; work that is not done is left as after any crash."""
    if _is_first():
        print(
            "error: ended by SIGTERM; if you did not send it, another rank failed, and the launcher's "
            "report says which",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_ALL_HAVE_TRIED)
    os._exit(_CODE)


def _is_first() -> bool:
    """Of the processes that have one parent, by a name that goes when this process does."""
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0gptoss-convert-{os.getppid()}")
        except OSError:
            return False
        name.detach()
    return True
