"""Attention of GPT-OSS for inference: causal, with sinks, sliding windows and a cache of keys.

Shape letters: b sequences, s queries and t keys of each, n query heads, g key/value groups,
r = n / g heads of a group, d channels of a head.

>>> import torch
>>> from gptoss_kernels import attention
>>> ones = torch.ones(1, 2, 1, 16)
>>> attention.attend(ones, ones, ones, None, scale=0.25, offset=torch.tensor([0])).unique()
tensor([1.])
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gptoss_kernels import backends
from gptoss_kernels.backends import BACKENDS

__all__ = ["BACKENDS", "attend", "chosen"]
chosen = partial(backends.chosen, "attention")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    offset: Tensor,
    begin: Tensor | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k, sink) v, where the sink takes probability but gives no value.

    Query i of sequence j sits at key ``offset[j] + i``, and sees the keys up to there. What lies
    in rows of ``key`` and ``value`` that no query of a sequence sees never matters, NaN included.
    A query that sees nothing gives zeros. Softmax and sums are float32; no gradient is kept.
    Nothing waits for a GPU, and a CUDA graph holds for any later ``offset`` and ``begin``.

    Source of the formula: transformers ``models/gpt_oss/modeling_gpt_oss.py``,
    ``eager_attention_forward``.

    Args:
        query: ``[b, s, n, d]``; bfloat16, float16 or float32. Channels are next to each other;
            other strides are free, here and in the next two.
        key: ``[b, t, g, d]``, of the same dtype. Query head h uses group ``h // r``.
        value: ``[b, t, g, d]``, likewise.
        sinks: ``[n]`` logits of any float dtype; None if there are no sinks.
        scale: above zero.
        offset: int64 ``[b]``, with ``offset + s <= t``: values are not checked.
        begin: int64 ``[b]``, the first key of each sequence that counts; None for 0.
        window: how many keys a query sees at most, its own included; None for all.
        backend: one of ``BACKENDS``; None takes the best for the device.

    Returns:
        ``[b, s, n, d]``, contiguous, in the dtype of ``query``.

    Raises:
        ValueError: the tensors do not belong together, or the backend does not run here.

    """
    _check(query, key, value, sinks, offset, begin)
    if not 0 < scale < float("inf"):
        raise ValueError(f"the scale must be above zero and finite, not {scale}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys leaves nothing to see")
    if window is not None and window >= key.shape[1]:
        window = None  # which hides nothing
    kernels = backends.load("attention", query.device, backend)
    if not query.numel():
        return query.new_empty(query.shape)
    made: Tensor = kernels.attend(
        query, key, value, sinks, scale=scale, offset=offset, begin=begin, window=window
    )
    return made


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    offset: Tensor,
    begin: Tensor | None,
) -> None:
    """Shapes, dtypes, devices; no values, which a GPU would have to be waited for."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} "
            "are not [b, s, n, d], [b, t, g, d] and [b, t, g, d]"
        )
    (b, s, n, d), (keys_b, t, g, keys_d) = query.shape, key.shape
    if keys_b != b or keys_d != d or d == 0 or g == 0 or n % g:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} differ in b or d, or g does "
            "not divide n"
        )
    if s > t:
        raise ValueError(f"{s} queries sit at keys of their own, but there are only {t}")
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, and must "
            "share one of bfloat16, float16, float32"
        )
    if any(x.stride(3) != 1 for x in (query, key, value) if d > 1):
        raise ValueError("the channels of query, key and value must be next to each other")
    if sinks is not None and (sinks.shape != (n,) or not sinks.is_floating_point()):
        raise ValueError(f"sinks are {sinks.dtype} {list(sinks.shape)}, and must be floats [{n}]")
    for name, x in (("offset", offset), ("begin", begin)):
        if x is not None and (x.shape != (b,) or x.dtype != torch.int64):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, and must be int64 [{b}]")
    for x in (key, value, sinks, offset, begin):
        if x is not None and x.device != query.device:
            raise ValueError(f"the query is on {query.device}, something else on {x.device}")
