"""The same command on processes of this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_plugins.launch.inner import Inner
    from gptoss_plugins.launch.size import Size

_NODE = "gptoss_plugins.launch.node"


def command_of(inner: Inner, size: Size) -> list[str]:
    """What to run, the program first. A conversion's processes take their numbers from torchrun, too."""
    python = [sys.executable, "-m"]
    if size.processes == 1:
        return [*python, "gptoss_convert", *inner.words]
    ranks = ["--standalone", f"--nproc_per_node={size.processes}"]
    return [*python, _NODE, *ranks, "-m", "gptoss_convert", *inner.words]
