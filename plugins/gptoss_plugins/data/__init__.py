"""``gptoss-convert data``: text into what training reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One, with commands of its own."""
    from gptoss_plugins.data.commands import data

    yield data
