"""Harmony's channels on a terminal, apart: analysis dimmed, the final answer plain."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gptoss_plugins.infer.completion import FINAL, Parser

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gptoss_plugins.infer.completion import Delta
    from gptoss_plugins.infer.tokenizer import Tokenizer


class Channels:
    """Prints an answer as it comes.

    Args:
        tokenizer: of the model.
        show: whether to print at all; other ranks only read along.

    """

    def __init__(self, tokenizer: Tokenizer, *, show: bool) -> None:
        self._parser, self._show = Parser(tokenizer), show
        self._is_open = False

    def push(self, token: int) -> None:
        """One more token."""
        self._print(self._parser.feed(token))

    def finish(self) -> None:
        """The answer has ended."""
        self._print(self._parser.finish())
        if self._show and self._is_open:
            click.echo()

    def _print(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas if self._show else ():
            text = printable(delta.text)
            if delta.opens:
                lead = "\n\n" if self._is_open else ""
                click.echo(lead + _label(delta.channel), nl=False)
                self._is_open = True
            click.echo(text if delta.channel == FINAL else click.style(text, dim=True), nl=False)
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


def messages_json(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Messages of an answer as plain values."""
    return [vars(message) for message in messages]
