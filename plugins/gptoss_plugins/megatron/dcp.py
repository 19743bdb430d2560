"""torch.distributed.checkpoint's classes of ``.metadata``, without the package around them.

Importing that package takes as long as torch itself (it loads DTensor, and that sympy), and fifty
MiB; and all that is wanted is a file of dataclasses, and pickles that name them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGE = "torch.distributed.checkpoint"


@dataclass
class _StorageInfo:
    """Like torch's, which stands in a module that needs the whole package."""

    relative_path: str
    offset: int
    length: int


class Classes(NamedTuple):
    """The module ``metadata``, and ``filesystem._StorageInfo``."""

    metadata: Any
    storage_info: Any


@contextlib.contextmanager
def classes() -> Iterator[Classes]:
    """Within it, they can be pickled. Nothing is left behind for who imports the package later."""
    if _PACKAGE in sys.modules:
        metadata, filesystem = map(_inside, ("metadata", "filesystem"))
        yield Classes(metadata, filesystem._StorageInfo)
        return
    import torch

    before = set(sys.modules)
    package, filesystem = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.filesystem")
    package.__path__ = [str(Path(torch.__file__).parent / "distributed" / "checkpoint")]
    info = type("_StorageInfo", (_StorageInfo,), {"__module__": filesystem.__name__})
    filesystem._StorageInfo = info  # type: ignore[attr-defined]
    sys.modules |= {_PACKAGE: package, filesystem.__name__: filesystem}
    try:
        yield Classes(_inside("metadata"), info)
    finally:
        for name in [n for n in sys.modules if n.startswith(_PACKAGE) and n not in before]:
            del sys.modules[name]


def _inside(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")
