"""When a run ends before its last step: told to by SIGTERM, by its config, or by the clock."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainConfig


class Stop:
    """Asked after every step, by all ranks together."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._came = False
        minutes = config.exit_duration_in_mins
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def __enter__(self) -> Self:
        if self._config.exit_signal_handler:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        # Slurm tells the ranks and their launcher, which tells them again: that must not end one early.
        if self._config.exit_signal_handler:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._came else self._before)

    def _note(self, *_: object) -> None:
        self._came = True

    def is_wanted(self, step: int) -> bool:
        """The same answer on all ranks: a signal, or the time, may reach only one in this step."""
        interval = self._config.exit_interval
        if interval is not None and step % interval == 0:
            return True
        if not self._config.exit_signal_handler and self._end is None:
            return False
        late = self._end is not None and time.monotonic() >= self._end
        wanted = torch.tensor([float(self._came or late)], device=self._device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return bool(wanted.item())
