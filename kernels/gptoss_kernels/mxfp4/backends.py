"""The backends by name, and which of them serves a device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_kernels.backends import has_numba, triton_missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch


@dataclass(frozen=True)
class Backend:
    """One implementation, a module with ``decode`` and ``encode``.

    Both take ``[E, A, B, K]`` views of any strides (``views.py``), contiguous uint8 blocks
    ``[E, A*B, K/32, 16]`` and scales ``[E, A*B, K/32]``, all of one device, and write into them::

        decode(blocks, scales, view)                # view: bfloat16, written
        encode(view, rule, hint, blocks, scales)    # view: bfloat16 or float32; hint: like scales, or None

    All make the same bytes. A block with NaN or infinity is encoded as scale 255, codes 0.

    Attributes:
        name: as in ``--codec-backend``.
        missing: device -> why it does not run there (the end of a sentence), or None if it does.

    """

    name: str
    missing: Callable[[torch.device], str | None]

    def load(self) -> ModuleType:
        """Import it."""
        return importlib.import_module(f"gptoss_kernels.mxfp4.{self.name}")


def _anywhere(device: torch.device) -> str | None:
    return None


def _numba(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on the CPU only"
    return None if has_numba() else "needs numba: pip install 'gptoss-convert[cpu]'"


AUTO = "auto"
BACKENDS = {  # best first
    "triton": Backend("triton", triton_missing),
    "numba": Backend("numba", _numba),
    "table": Backend("table", _anywhere),
    "reference": Backend("reference", _anywhere),
}


def choose(device: torch.device, name: str | None = None) -> ModuleType:
    """The backend called ``name``, or the best for the device (None or ``auto``).

    Raises:
        ValueError: there is none of that name, or it does not run here; one sentence.

    """
    return chosen(device, name).load()


def chosen(device: torch.device, name: str | None = None) -> Backend:
    """Likewise, without importing it."""
    if name is None or name == AUTO:
        usable = (b for b in BACKENDS.values() if not b.missing(device))
        return next(b for b in usable if b.name != "triton" or device.type == "cuda")
    if name not in BACKENDS:
        names = ", ".join((AUTO, *BACKENDS))
        raise ValueError(f"there is no MXFP4 backend {name!r}; choose {names}")
    if reason := BACKENDS[name].missing(device):
        raise ValueError(f"the MXFP4 backend {name} {reason}")
    return BACKENDS[name]
