"""Attention with sinks in plain torch, on any device: a block of queries at a time.

A block sees only the keys up to its end, and from its window's start, so there is never a whole matrix
of scores. Shape letters as in attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

QUERIES = 1024  # of a block


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    left: int | None,
    hidden: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k, sink) v, where the sink takes probability but gives no value.

    Source of the formula: transformers ``models/gpt_oss/modeling_gpt_oss.py``,
    ``eager_attention_forward``.

    Args:
        query: ``[s, b, n, d]``; the last query sits at the last key.
        key: ``[t, b, g, d]``.
        value: ``[t, b, g, d]``.
        sinks: ``[n]`` logits; None if there are none.
        scale: of the scores.
        left: how many keys before its own a query sees; None for all.
        hidden: bool, broadcast to ``[b, 1, s, t]``; True hides, beyond what causality and the window
            hide anyway.
        starts: int64 ``[b, t]``: the first key that each position sees, as the first of its sequence.

    Returns:
        ``[s, b, n * d]`` in the dtype of ``value``.

    """
    s, t = len(query), len(key)
    blocks = []
    for i in range(0, s, QUERIES):
        rows = query[i : i + QUERIES]
        first = t - s + i  # the key position of the block's first query
        stop = first + len(rows)
        start = 0 if left is None else max(0, first - left)
        mask = _unseen(first, start, stop, left, query.device)
        if hidden is not None:
            part = hidden[..., i : i + len(rows), :] if hidden.shape[-2] > 1 else hidden
            mask = mask | part[..., start:stop]
        if starts is not None:
            keys = torch.arange(start, stop, device=query.device)
            mask = mask | (keys < starts[:, first:stop, None])[:, None]
        blocks.append(_block(rows, key[start:stop], value[start:stop], sinks, scale, mask))
    return torch.cat(blocks)


def _unseen(first: int, start: int, stop: int, left: int | None, device: torch.device) -> Tensor:
    """Key positions start..stop that queries first..stop may not see: bool ``[s, t]``."""
    at = torch.arange(first, stop, device=device)[:, None]
    of = torch.arange(start, stop, device=device)[None, :]
    return of > at if left is None else (of > at) | (of < at - left)


def _block(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, mask: Tensor
) -> Tensor:
    s, b, n, d = query.shape
    t, g = key.shape[0], key.shape[2]
    # [s, b, n, d] -> [b, g, r * s, d]: the heads of a group share its keys without a copy.
    q = query.reshape(s, b, g, n // g, d).permute(1, 2, 3, 0, 4).reshape(b, g, -1, d)
    scores = torch.matmul(q, key.permute(1, 2, 3, 0)).view(b, n, s, t).float() * scale
    scores = scores.masked_fill(mask, float("-inf"))
    if sinks is None:
        probs = scores.softmax(dim=-1)
    else:
        column = sinks.float().view(1, n, 1, 1).expand(b, n, s, 1)
        probs = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    out = torch.matmul(probs.to(value.dtype).reshape(b, g, -1, t), value.permute(1, 2, 0, 3))
    return out.view(b, n, s, d).permute(2, 0, 1, 3).reshape(s, b, n * d)
