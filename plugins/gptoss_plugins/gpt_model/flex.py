"""Attention with sinks for training on GPUs, by torch's flex attention: neither scores nor masks in memory.

Flex attention knows no sinks. They need none of its kernel: a sink only makes the softmax's
denominator larger, so the output without it is scaled by ``exp(lse) / (exp(lse) + exp(sink))``, which
is ``sigmoid(lse - sink)``. Shape letters as in attention.py.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import flex_attention as flex

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    left: int | None,
    starts: Tensor | None = None,
) -> Tensor:
    """As ``by_blocks.attend``, with as many keys as queries; ``[s, b, n * d]``."""
    s, b, n, d = query.shape
    rows = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    out, lse = _attention(query.is_cuda)(
        *rows, scale=scale, block_mask=_mask(query, left, starts), enable_gqa=True
    )
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1).to(out.dtype)
    made: Tensor = out.permute(2, 0, 1, 3).reshape(s, b, n * d)
    return made


@functools.cache
def _attention(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Gives output ``[b, n, s, d]`` and natural logarithms of the denominators ``[b, n, s]``."""
    run: Any = torch.compile(flex.flex_attention) if compiled else flex.flex_attention
    if "return_aux" in inspect.signature(flex.flex_attention).parameters:
        wanted = flex.AuxRequest(lse=True)

        def with_lse(*tensors: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
            out, aux = run(*tensors, return_aux=wanted, **rest)
            return out, aux.lse

        return with_lse
    return functools.partial(run, return_lse=True)


# Of the step's layers, half have a window: a mask of each kind serves them all.
_last: dict[int | None, tuple[Any, Any]] = {}


def _mask(query: Tensor, left: int | None, starts: Tensor | None) -> Any:
    """Which blocks of keys each block of queries sees."""
    s, b = query.shape[:2]
    of = (s, b, query.device) if starts is None else starts
    known = _last.get(left)
    if known is not None and (known[0] is of if starts is not None else known[0] == of):
        return known[1]
    first = _first_seen(query, left, starts)

    # One form for all layers and rows, lest each of them is compiled for itself.
    def seen(row: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first[row, q])

    # compiled, lest it makes a bool for every pair of a query and a key
    compiled = query.is_cuda
    mask = flex.create_block_mask(seen, b, None, s, s, str(query.device), _compile=compiled)
    _last[left] = (of, mask)
    return mask


def _first_seen(query: Tensor, left: int | None, starts: Tensor | None) -> Tensor:
    """The first key of each query: int32 ``[b, s]``."""
    s, b = query.shape[:2]
    first = torch.zeros((b, s), dtype=torch.int64, device=query.device)
    if starts is not None:
        first = torch.maximum(first, starts)
    if left is not None:
        first = torch.maximum(first, torch.arange(s, device=query.device) - left)
    return first.int()
