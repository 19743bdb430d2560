"""Which of a kernel's implementations serves a device: Triton, or the reference in plain torch."""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    import torch

BACKENDS = ("triton", "reference")  # best first


def load(kernel: str, device: torch.device, backend: str | None = None) -> ModuleType:
    """The module ``gptoss_kernels.<kernel>.<chosen>``."""
    return importlib.import_module(f"gptoss_kernels.{kernel}.{chosen(kernel, device, backend)}")


def chosen(kernel: str, device: torch.device, backend: str | None = None) -> str:
    """The backend of that name, or the best for the device.

    Raises:
        ValueError: there is none of that name, or it does not run here; one sentence.

    """
    if backend is None:
        return "triton" if device.type == "cuda" and _has_triton() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"there is no {kernel} backend {backend!r}; choose {', '.join(BACKENDS)}")
    if backend == "triton" and (reason := triton_missing(device)):
        raise ValueError(f"the {kernel} backend triton {reason}")
    return backend


def triton_missing(device: torch.device) -> str | None:
    """Why Triton does not run there (the end of a sentence), or None if it does."""
    if not _has_triton():
        return "needs triton: pip install 'gptoss-convert[triton]'"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA device (or TRITON_INTERPRET=1, to try it out on a CPU)"


@cache
def has_numba() -> bool:
    """Whether it is installed."""
    return find_spec("numba") is not None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
