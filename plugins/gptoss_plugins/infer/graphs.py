"""One decoding step as a CUDA graph: a launch in place of the thousand that Python would make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_plugins.infer.cache import Cache
    from gptoss_plugins.infer.decoder import Decoder

_WARM_UPS = 2  # compiles kernels, and lets libraries take the memory they keep


def can_capture(decoder: Decoder) -> bool:
    """Whether there is a GPU, and no other rank to talk to in a step."""
    return decoder.device.type == "cuda" and dist.get_world_size() == 1


class GraphedStep:
    """``Decoder.step`` for one new token of each sequence, of one cache.

    Args:
        decoder: whose.
        cache: with something in it. Trying the step out leaves no trace that anyone reads.

    """

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        batch = cache.shape.batch
        self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=decoder.device)
        self._counts = torch.zeros(batch, dtype=torch.int64, device=decoder.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                decoder.step(self._ids, self._counts, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = decoder.step(self._ids, self._counts, cache)

    def step(self, ids: Tensor, counts: Tensor) -> Tensor:
        """As ``Decoder.step``; the logits are valid until the next call."""
        self._ids.copy_(ids)
        self._counts.copy_(counts)
        self._graph.replay()
        assert self._logits is not None
        return self._logits
