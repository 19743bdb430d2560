"""Whether what runs models is installed; without importing it."""

from __future__ import annotations

from importlib.util import find_spec

from gptoss_convert.errors import ConfigError


def require_installed(what: str, *packages: str, extras: str) -> None:
    """Raise ConfigError unless all packages are there.

    Args:
        what: the work that needs them, the beginning of a sentence.
        packages: as they are imported.
        extras: of ours that bring them.

    """
    for name in packages:
        if not find_spec(name):
            raise ConfigError(
                f"{what} needs {name}, which is not installed: pip install 'gptoss-convert[{extras}]'"
            )
