"""How much memory a rank has used."""

from __future__ import annotations

import resource

import torch


def peak_bytes(place: torch.device) -> int:
    """The most so far: of its GPU, or, on a CPU, of the process."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
