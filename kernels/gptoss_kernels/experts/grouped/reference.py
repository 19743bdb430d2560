"""Both functions and their gradients in plain torch, float32 inside: for CPUs, and what Triton must match."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_kernels.experts import Activation


def gated(gate_up: Tensor, bias: Tensor | None, counts: Tensor, how: Activation) -> Tensor:
    """As ``gptoss_kernels.experts.gated``, which has checked the arguments."""
    return _activation(_biased(gate_up, bias, counts), how).to(gate_up.dtype)


def gated_back(
    gradient: Tensor, gate_up: Tensor, bias: Tensor | None, counts: Tensor, how: Activation
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``gate_up`` and ``bias`` from that of the result, ``[T, I]``."""
    with torch.enable_grad():
        before = _biased(gate_up, bias, counts).detach().requires_grad_()
        after = _activation(before, how)
    (found,) = torch.autograd.grad(after, before, gradient.float())
    return found.to(gate_up.dtype), _summed(found, bias, counts)


def weighed(y: Tensor, bias: Tensor | None, counts: Tensor, shares: Tensor) -> Tensor:
    """As ``gptoss_kernels.experts.weighed``, which has checked the arguments."""
    return (_biased(y, bias, counts) * shares.float()[:, None]).to(y.dtype)


def weighed_back(
    gradient: Tensor, y: Tensor, bias: Tensor | None, counts: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of ``y``, ``bias`` and ``shares`` from that of the result, ``[T, H]``."""
    for_shares = (gradient.float() * _biased(y, bias, counts)).sum(1)
    found = gradient.float() * shares.float()[:, None]
    return found.to(y.dtype), _summed(found, bias, counts), for_shares.to(shares.dtype)


def _activation(gate_up: Tensor, how: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    if how.limit is not None:
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
    return gate * torch.sigmoid(how.alpha * gate) * (up + how.offset)


def _biased(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Float32 ``[T, N]``: rows plus the bias of their expert."""
    if bias is None:
        return rows.float()
    of_rows = bias.float().repeat_interleave(counts, 0, output_size=len(rows))
    return of_rows.add_(rows)


def _summed(found: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor | None:
    """The bias' gradient: of each expert, the sum of its rows' float32 gradients."""
    if bias is None:
        return None
    # unsafe: does not look at the values of counts, which a GPU would have to be waited for
    summed = torch.segment_reduce(found, "sum", lengths=counts, initial=0, unsafe=True)
    return summed.to(bias.dtype)
