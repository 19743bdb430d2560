"""Which token comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose from the logits; the steps and their order are those of transformers.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only so many of the most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have this probability; 1 for all.
        seed: of the drawing; a sequence's draws depend on it and on its number in the batch alone.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1


class Sampler:
    """Draws for the sequences of a batch.

    Args:
        how: to choose.
        batch: how many sequences.

    """

    def __init__(self, how: Sampling, batch: int) -> None:
        import torch

        self._how = how
        self._generators = [torch.Generator().manual_seed(how.seed + i) for i in range(batch)]

    def choose(self, logits: Tensor) -> Tensor:
        """Logits float32 ``[b, vocabulary]`` -> token ids int64 ``[b]`` on the same device."""
        if self._how.is_greedy:
            return logits.argmax(-1)
        import torch

        shares = probabilities(logits, self._how).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(shares, self._generators, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """Of every token, those left out at 0: float32 ``[b, vocabulary]``; temperature above 0."""
    logits = (logits - logits.amax(-1, keepdim=True)) / how.temperature  # none overflows
    if 0 < how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if how.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - how.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits.softmax(-1)
