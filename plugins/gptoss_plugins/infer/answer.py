"""The text of an answer as it grows: complete characters only, and nothing of a text that ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_plugins.infer.tokenizer import Tokenizer


class Answer:
    """Of one sequence.

    Args:
        tokenizer: of the model.
        stops: texts, any of which ends the answer and is no part of it.

    Attributes:
        text: what may be shown so far.
        has_ended: whether one of the texts was found.

    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.has_ended = False
        self._stops = [stop for stop in stops if stop]
        self._stream = tokenizer.stream()
        self._held = ""  # the end of the text so far, which may be the beginning of a stop

    def push(self, token: int) -> str:
        """What one more token adds to the text that may be shown."""
        return self._grow(self._stream.push(token))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        added = self._grow(self._stream.finish())
        if self.has_ended:
            return added
        held, self._held = self._held, ""
        self.text += held
        return added + held

    def _grow(self, new: str) -> str:
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


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
