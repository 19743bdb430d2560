"""One decoding step as a CUDA graph: a launch in place of the thousand that Python would make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_plugins.infer.cache import Cache
    from gptoss_plugins.infer.decoder import Decoder

_WARM_UPS = 2  # compiles kernels, and lets libraries take the memory they keep


def can_capture(decoder: Decoder) -> bool:
    """Whether there is a GPU, and a step needs nothing of the host: stages hand on what they made from
    outside of a graph, and to sort tokens by the ranks of their experts the host has to know how many.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    spread = parallel_state.get_expert_model_parallel_world_size()
    return bool(decoder.device.type == "cuda" and stages == spread == 1)


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
