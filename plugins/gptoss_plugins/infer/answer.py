"""The text of an answer as it grows, and nothing of a text that ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Answer:
    """Of one sequence.

    Args:
        stops: texts, any of which ends the answer and is no part of it.

    Attributes:
        text: what may be shown so far.
        has_ended: whether one of the texts was found.

    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.has_ended = False
        self._stops = stops
        self._held = ""  # the end of the text so far, which may be the beginning of a stop

    def push(self, new: str) -> str:
        """What more text adds to that which may be shown."""
        if self.has_ended:
            return ""
        self._held += new
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.has_ended, keep = True, 0
            shown = self._held[: min(found)]
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
            shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :] if keep else ""
        self.text += shown
        return shown

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        self.text += held
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
