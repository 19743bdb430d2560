"""An answer as it comes: watched for texts that end it, and shown, plain or by harmony's channels."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from gptoss_plugins.infer.answer import Answer
from gptoss_plugins.infer.completion import FINAL, Parser

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gptoss_plugins.infer.completion import Delta, Message
    from gptoss_plugins.infer.tokenizer import Tokenizer


class Plain:
    """Text without a form.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer.
        show: whether to print it as it comes.

    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, show: bool) -> None:
        self._answer, self._stream, self._show = Answer(stops), tokenizer.stream(), show

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._answer.text

    @property
    def messages(self) -> list[Message]:
        """None: it has no form."""
        return []

    def push(self, token: int) -> bool:
        """One more token; whether it ends the answer."""
        self._say(self._answer.push(self._stream.push(token)))
        return self._answer.has_ended

    def finish(self) -> None:
        """The answer has ended."""
        self._say(self._answer.push(self._stream.finish()) + self._answer.finish())
        if self._show:
            click.echo()

    def _say(self, text: str) -> None:
        if self._show and text:
            click.echo(printable(text), nl=False)
            sys.stdout.flush()


class Harmony:
    """Messages on channels: analysis dimmed, the final answer plain. Arguments as of ``Plain``.

    A text that ends the answer is looked for in every message by itself, and not in what is between
    them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, show: bool) -> None:
        self._parser, self._stops, self._show = Parser(tokenizer), stops, show
        self._answer = Answer(stops)
        self._is_open = False

    @property
    def text(self) -> str:
        """What the user is to see: the final messages."""
        return "\n".join(m.content for m in self.messages if m.channel == FINAL)

    @property
    def messages(self) -> list[Message]:
        """Complete ones; all of them after ``finish``."""
        found = self._parser.messages
        if self._answer.has_ended and found:
            return [*found[:-1], replace(found[-1], content=self._answer.text, ended_by=None)]
        return found

    def push(self, token: int) -> bool:
        """One more token; whether it ends the answer."""
        self._say(self._parser.feed(token))
        return self._answer.has_ended

    def finish(self) -> None:
        """The answer has ended."""
        self._say(self._parser.finish())
        self._print(self._answer.finish())
        if self._show and self._is_open:
            click.echo()

    def _say(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if self._answer.has_ended:
                return
            if delta.opens:
                self._print(self._answer.finish())
                self._answer, self._channel = Answer(self._stops), delta.channel
                if self._show:
                    lead = "\n\n" if self._is_open else ""
                    click.echo(lead + _label(delta.channel), nl=False)
                self._is_open = True
            self._print(self._answer.push(delta.text))

    def _print(self, text: str) -> None:
        if self._show and text:
            dim = self._channel != FINAL
            click.echo(click.style(printable(text), dim=True) if dim else printable(text), nl=False)
            sys.stdout.flush()


def _label(channel: str) -> str:
    """The channel's name; where answers are plain text, the final one is told apart by it, too."""
    if channel == FINAL and sys.stdout.isatty():
        return ""
    return click.style(f"[{printable(channel)}] ", dim=True)


def printable(text: str) -> str:
    """A model must not draw on the terminal; elsewhere its text stays as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
