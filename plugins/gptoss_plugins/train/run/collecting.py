"""Python's garbage, collected on all ranks in the same step: else each makes the others wait in turn."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gptoss_plugins.train.config import TrainConfig


class Collecting:
    """Where the config asks for it, none but at its steps; else nothing changes."""

    def __init__(self, config: TrainConfig) -> None:
        self._wanted, self._interval = config.manual_gc, config.manual_gc_interval

    def __enter__(self) -> Self:
        self._before = gc.isenabled()
        if self._wanted:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted and self._before:
            gc.enable()

    def after(self, step: int, *, evaluated: bool) -> None:
        """To be called after every step."""
        if self._wanted and (evaluated or (self._interval and step % self._interval == 0)):
            gc.collect()
