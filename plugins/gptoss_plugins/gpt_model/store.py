"""torch's store, by a connection of our own: torch's is busy while it waits for other ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gptoss_convert.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

torch_dist: Any = dist  # whose stores are public, but not in the stubs
_TIMEOUT = timedelta(seconds=10)
_POLL = 0.1  # seconds


class Words:
    """A word of each rank, which all can read. Errors of the store are RuntimeError.

    Attributes:
        is_with_launcher: whether torchrun holds the store; without that, rank 0 does.

    """

    def __init__(self, rank: int, while_waiting: Callable[[], None]) -> None:
        """Connect.

        Args:
            rank: this one.
            while_waiting: called while nothing answers yet; what it raises ends the waiting.

        Raises:
            ConfigError: it is not said where the store is, or rank 0 cannot be reached there.

        """
        self.is_with_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = _address()
        is_master = rank == 0 and not self.is_with_launcher
        if not is_master:
            _wait_for(host, port, while_waiting)
        try:
            store = torch_dist.TCPStore(
                host,
                port,
                is_master=is_master,
                timeout=_TIMEOUT,
                wait_for_workers=False,
                multi_tenant=True,  # init_process_group finds this one there
            )
        except RuntimeError as error:
            raise ConfigError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: no store of torch's can be "
                f"{'opened' if is_master else 'reached'} there ({str(error).partition(chr(10))[0]}); "
                f"set MASTER_PORT to a port that is free on the machine of rank 0"
            ) from None
        launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = torch_dist.PrefixStore(f"gptoss-convert/{launch}", store)
        self._asked: set[object] = set()

    def write(self, rank: int, word: str) -> None:
        """In place of what the rank said before."""
        with self._ask():
            self._store.set(str(rank), word)

    def read(self, rank: int) -> str:
        """What a rank said last; "" if nothing yet."""
        with self._ask():
            key = str(rank)
            return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def is_first(self, what: str) -> bool:
        """Whether no rank has called this before."""
        with self._ask():
            return bool(self._store.add(what, 1) == 1)

    def unanswered(self) -> set[object]:
        """Something for each question that the store has not answered yet."""
        return set(self._asked)

    @contextlib.contextmanager
    def _ask(self) -> Iterator[None]:
        question = object()
        self._asked.add(question)
        try:
            yield
        finally:
            self._asked.discard(question)


def _address() -> tuple[str, int]:
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ConfigError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')} and MASTER_ADDR and MASTER_PORT do not say "
            f"where rank 0 is; start the processes with python -m torch.distributed.run, or set both"
        ) from None


def _wait_for(host: str, port: int, while_waiting: Callable[[], None]) -> None:
    """Until something listens there. In Python, where signals are heard; torch would not."""
    while True:
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT.total_seconds()).close()
        except OSError:
            while_waiting()
            time.sleep(_POLL)
        else:
            return
