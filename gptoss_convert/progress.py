"""Progress of long work, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING

from gptoss_convert.staging import human

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.execute import Progress

log = logging.getLogger("gptoss_convert")
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def reporting(what: str, total: int, *, show: bool) -> Iterator[Progress]:
    """A callback that takes the bytes just finished, of ``total``, from any thread."""
    if not show:
        yield lambda nbytes: None
    elif sys.stderr.isatty():
        with _bar(what, total) as progress:
            yield progress
    else:
        yield _Lines(what, total).advance


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


class _Lines:
    """A log line every ten seconds; short work says nothing."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._said < _SECONDS_BETWEEN_LINES:
                return
            self._said = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            log.info(
                "%s: %s of %s, %s/s, %.0f s left",
                self._what,
                human(self._done),
                human(self._total),
                human(rate),
                left,
            )
