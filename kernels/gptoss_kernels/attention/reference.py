"""Attention in plain torch, float32 inside: for CPUs, and what the other backend must match.

Queries go in blocks, so that scores need little memory and a window little work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES = 1 << 23  # float32 scores in memory at a time, if one query has no more
_BLOCK = 1024  # queries in a block at most


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    offset: Tensor,
    begin: Tensor | None,
    window: int | None,
) -> Tensor:
    """As ``gptoss_kernels.attention.attend``, which has checked the arguments."""
    b, s, n, _ = query.shape
    t = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    step = _step(b * n, t, window)
    for i in range(0, s, step):
        block = query[:, i : i + step]
        at = offset[:, None] + torch.arange(i, i + block.shape[1], device=query.device)
        of = _near(at, t, window)
        real = (of <= at[:, -1:]) & (of < t)
        if begin is not None:
            real &= of >= begin[:, None]
        seen = real[:, None] & (of[:, None] <= at[:, :, None])
        if window is not None:
            seen &= of[:, None] > at[:, :, None] - window
        keys, values = (_rows(cache, of, real, window) for cache in (key, value))
        out[:, i : i + step] = _attend(block, keys, values, seen, sinks, scale)
    return out


def _step(heads: int, t: int, window: int | None) -> int:
    """How many queries go together."""
    step = _BLOCK
    if window is not None:  # a block sees as many keys more than a query as it has queries
        step = min(step, max(window, 64))
        t = min(t, step + window)
    return max(1, min(step, _SCORES // (heads * t)))


def _near(at: Tensor, t: int, window: int | None) -> Tensor:
    """Keys that a block of queries may see: int64 ``[b, span]``, or ``[1, span]`` if it is 0, 1, ...

    ``at``: ``[b, m]``, keys where the queries sit. Indices can pass ``t``. On a GPU all keys are
    taken where there is no window, as it would have to be waited for to know more.
    """
    if window is None:
        last = t if at.is_cuda else int(at[:, -1].max()) + 1
        return torch.arange(max(1, min(last, t)), device=at.device)[None]
    span = min(t, at.shape[1] + window - 1)
    first = (at[:, :1] - window + 1).clamp(min=0)
    return first + torch.arange(span, device=at.device)


def _rows(cache: Tensor, of: Tensor, real: Tensor, window: int | None) -> Tensor:
    """float32 ``[b, g, span, d]`` of a cache ``[b, t, g, d]``; zero, not NaN, what is not real."""
    if window is None:
        rows = cache[:, : of.shape[1]]
    else:
        sequences = torch.arange(len(cache), device=cache.device)[:, None]
        rows = cache[sequences, of.clamp(max=cache.shape[1] - 1)]
    rows = rows.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if rows.is_cuda or not bool(real.all()):
        rows = rows.masked_fill(~real[:, None, :, None], 0)
    return rows


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sinks: Tensor | None, scale: float
) -> Tensor:
    """float32 ``[b, m, n, d]`` from ``[b, m, n, d]``, twice ``[b, g, span, d]``, ``[b, m, span]``."""
    b, m, n, d = query.shape
    g = key.shape[1]
    r = n // g
    # [b, m, n, d] -> [b, g, r * m, d]: the heads of a group share its keys without a copy.
    q = (query.float() * scale).view(b, m, g, r, d).permute(0, 2, 3, 1, 4).reshape(b, g, r * m, d)
    scores = torch.matmul(q, key.mT).view(b, g, r, m, -1)
    scores.masked_fill_(~seen[:, None, None], float("-inf"))
    most = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float().view(g, r, 1, 1)
        most = torch.maximum(most, sink)
    most = most.clamp(min=torch.finfo(torch.float32).min)  # where nothing is seen
    weights = scores.sub_(most).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sink - most).exp()
    total.masked_fill_(total == 0, 1)
    sums = torch.matmul(weights.view(b, g, r * m, -1), value).view(b, g, r, m, d)
    return (sums / total).permute(0, 3, 1, 2, 4).reshape(b, m, n, d)
