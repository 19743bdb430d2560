"""Context parallelism for attention: sequences in parts outside, heads in parts inside.

Each rank has consecutive tokens of every sequence. For attention the ranks exchange (all-to-all), so
that each has all tokens of some heads; sinks stay with their heads, which exchanging keys would not do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.tensor_parallel.mappings import all_to_all

if TYPE_CHECKING:
    from torch import Tensor


def whole_sequences(part: Tensor, group: Any) -> Tensor:
    """``[s / c, b, n, d]`` -> ``[s, b, n / c, d]`` of c ranks; n may be heads or groups."""
    ranks = group.size()
    s, b, n, d = part.shape
    heads = part.view(s, b, ranks, n // ranks, d).permute(2, 0, 1, 3, 4)
    found: Tensor = all_to_all(group, heads.contiguous())
    return found.reshape(ranks * s, b, n // ranks, d)


def whole_heads(part: Tensor, group: Any, channels: int) -> Tensor:
    """``[s, b, (n / c) * d]`` -> ``[s / c, b, n * d]``, the way back; ``channels`` is d."""
    ranks = group.size()
    s, b, width = part.shape
    tokens: Tensor = all_to_all(group, part.contiguous())
    parts = tokens.view(ranks, s // ranks, b, width // channels, channels)
    return parts.permute(1, 2, 0, 3, 4).reshape(s // ranks, b, ranks * width)


def own_heads(sinks: Tensor | None, group: Any) -> Tensor | None:
    """``[n]`` -> ``[n / c]`` of this rank."""
    return None if sinks is None else sinks.chunk(group.size())[group.rank()]
