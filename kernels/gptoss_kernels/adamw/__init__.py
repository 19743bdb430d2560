"""AdamW in place, in one pass, for bfloat16 weights that keep what float32 would: 2 bytes more.

>>> import torch
>>> from gptoss_kernels import adamw
>>> param, remainder = adamw.split(torch.tensor([0.1]))
>>> param, adamw.join(param, remainder)
(tensor([0.1001], dtype=torch.bfloat16), tensor([0.1000]))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_kernels import backends
from gptoss_kernels.adamw.master import join, split
from gptoss_kernels.backends import BACKENDS

__all__ = ["BACKENDS", "Factors", "join", "split", "step_"]
_DTYPES = (torch.bfloat16, torch.float32)


class Factors(NamedTuple):
    """A step's numbers, computed in float64 as ``torch.optim.AdamW`` does, used as float32.

    Attributes:
        decay: of the weight, ``1 - lr * weight_decay``.
        fresh1: share of the gradient in the first moment, ``1 - beta1``.
        beta2: of the second moment that stays.
        fresh2: share of the squared gradient in it, ``1 - beta2``.
        root: the square root of ``1 - beta2 ** step``, which corrects the second moment's bias.
        eps: added to the second moment's square root.
        rate: ``lr / (1 - beta1 ** step)``.
        scale: of the gradient.

    """

    decay: float
    fresh1: float
    beta2: float
    fresh2: float
    root: float
    eps: float
    rate: float
    scale: float


@torch.no_grad()
def step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One step of AdamW: changes the weight, its remainder and its moments.

    All is computed in float32, and rounded to nearest where it is stored. With a remainder the
    weight is not rounded: param and remainder become what :func:`split` makes of the float32
    weight that the same step gives from ``join(param, remainder)``. Nothing waits for a GPU.

    Source of the formula: arXiv 1711.05101, algorithm 2, in the order of ``torch.optim.AdamW``.

    Args:
        param: bfloat16 or float32, contiguous, as all that follow; of any shape.
        grad: bfloat16 or float32, with as many elements, as all that follow.
        exp_avg: the first moment, bfloat16 or float32.
        exp_avg_sq: the second moment, bfloat16 or float32.
        remainder: int16, to a bfloat16 param; None if there is none.
        lr: learning rate.
        beta1: how much of the first moment stays, in [0, 1).
        beta2: how much of the second moment stays, in [0, 1).
        eps: added to the second moment's square root.
        weight_decay: decoupled; the weight shrinks by ``lr * weight_decay`` of itself.
        step: the number of this step, from 1.
        grad_scale: the gradient is multiplied with it first, in float32, as clipping does.
        backend: one of ``BACKENDS``; None takes the best for the device.

    Raises:
        ValueError: the tensors or numbers do not belong together, or the backend does not run here.

    """
    _check(param, grad, exp_avg, exp_avg_sq, remainder)
    factors = _factors(lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    kernels = backends.load("adamw", param.device, backend)
    tensors = (param, grad, exp_avg, exp_avg_sq, remainder)
    if param.numel():
        kernels.step_(*(None if x is None else x.view(-1) for x in tensors), factors)


def _factors(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> Factors:
    if step < 1 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(
            f"steps count from 1 and betas are in [0, 1), not step {step}, betas {beta1}, {beta2}"
        )
    return Factors(
        decay=1 - lr * weight_decay,
        fresh1=1 - beta1,
        beta2=beta2,
        fresh2=1 - beta2,
        root=math.sqrt(1 - beta2**step),
        eps=eps,
        rate=lr / (1 - beta1**step),
        scale=grad_scale,
    )


def _check(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, remainder: Tensor | None
) -> None:
    named = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, x in named.items():
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}, and must be bfloat16 or float32")
    if remainder is not None:
        if remainder.dtype != torch.int16 or param.dtype != torch.bfloat16:
            raise ValueError(
                f"a remainder is int16 and its param bfloat16, not {remainder.dtype} and {param.dtype}"
            )
        named["remainder"] = remainder
    for name, x in named.items():
        if x.numel() != param.numel() or x.device != param.device or not x.is_contiguous():
            raise ValueError(
                f"{name} has {x.numel()} elements on {x.device}, and must have the param's "
                f"{param.numel()} on {param.device}, contiguous"
            )
