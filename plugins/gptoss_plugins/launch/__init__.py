"""``gptoss-convert launch``: any other command on a Slurm cluster, or on this machine's processes
(docs/cluster.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """``launch``, with ``slurm`` and ``local``."""
    from gptoss_plugins.launch.commands import launch

    yield launch
