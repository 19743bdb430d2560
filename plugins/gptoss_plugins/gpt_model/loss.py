"""The vocabulary's cross-entropy in chunks of tokens: logits of a few thousand rows at most, never float32.

Gradients are made where the logits are, in the forward pass, so no logits are kept or computed twice.
That takes the weight of each token's loss beforehand; what the sum is multiplied with afterwards (one
over the number of tokens, say) scales the gradients in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gptoss_kernels import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = 1 << 28  # logits at once, over this rank's part of the vocabulary: 512 MB in bfloat16


def weighted_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, group: Any
) -> Tensor:
    """Sum over tokens of weight times ``-log softmax(W h)[label]``.

    Args:
        hidden: ``[T, H]``, the same on all tensor-parallel ranks. Its gradient is this rank's part of
            the vocabulary's; summing over ranks is the caller's.
        weight: ``[V / ranks, H]``, this rank's rows.
        labels: int64 ``[T]``.
        weights: float32 ``[T]``; tokens of weight 0 give nothing.
        group: the tensor-parallel ranks.

    Returns:
        float32 scalar, the same on all ranks.

    """
    made: Tensor = _WeightedLoss.apply(hidden, weight, labels, weights, group)  # type: ignore[no-untyped-call]
    return made


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, group: Any
    ) -> Tensor:
        own = labels - group.rank() * len(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        for_hidden = torch.empty_like(hidden) if need_hidden else None
        for_weight = torch.zeros_like(weight) if need_weight else None
        rows = max(1, ELEMENTS // len(weight))
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            logits = hidden[part] @ weight.T
            picked, lse = _label_logits(logits, own[part], group)
            losses = torch.where(weights[part] == 0, 0.0, lse - picked)
            total += torch.dot(weights[part], losses)
            if not (need_hidden or need_weight):
                continue
            cross_entropy.gradient_(logits, own[part], lse, weights[part])
            if for_hidden is not None:
                torch.mm(logits, weight, out=for_hidden[part])
            if for_weight is not None:
                for_weight.addmm_(logits.T, hidden[part])
        ctx.save_for_backward(for_hidden, for_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if g is None else g.mul_(gradient) for g in ctx.saved_tensors]
        return (*found, None, None, None)


def _label_logits(logits: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Of each row the label's logit, and the logarithm of the softmax's denominator: float32 ``[T]``."""
    lse = cross_entropy.logsumexp(logits)
    here = (labels >= 0) & (labels < logits.shape[1])
    at = labels.clamp(0, logits.shape[1] - 1)
    picked = logits.gather(1, at[:, None])[:, 0].float().masked_fill(~here, 0.0)
    if group.size() > 1:
        dist.all_reduce(picked, group=group)
        parts = [torch.empty_like(lse) for _ in range(group.size())]
        dist.all_gather(parts, lse, group=group)
        lse = torch.stack(parts).logsumexp(0)
    return picked, lse
