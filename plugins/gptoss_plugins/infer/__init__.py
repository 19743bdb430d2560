"""``gptoss-convert generate`` and ``chat``: text from any of the checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """Two."""
    from gptoss_plugins.infer.chat import chat
    from gptoss_plugins.infer.generate import generate

    yield generate
    yield chat
