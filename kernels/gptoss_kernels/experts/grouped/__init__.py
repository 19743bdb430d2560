"""What surrounds the grouped matrix products of a mixture of experts: activation, biases, shares.

Rows are sorted by expert. Each function is one pass over them, forth and back, and keeps nothing for
the way back but its arguments.

Letters: T rows, E experts, H hidden, I width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_kernels import backends

if TYPE_CHECKING:
    from gptoss_kernels.experts import Activation

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gated(
    gate_up: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    activation: Activation,
    *,
    backend: str | None = None,
) -> Tensor:
    """What the experts' second product takes: the activation of the first one's result.

    Float32 inside, from the bias on; the gradient of a clamp is torch's, 1 at its bounds. The bias'
    gradient is a float32 sum in an order that does not change. Nothing waits for a GPU.

    Source of the formula: transformers ``models/gpt_oss/modeling_gpt_oss.py``, ``GptOssExperts``.

    Args:
        gate_up: ``[T, 2 * I]``, columns ``[gate; up]``; bfloat16, float16 or float32.
        bias: ``[E, 2 * I]`` of one of these, too, or None.
        counts: int64 ``[E]``, rows of each expert, on the same device. They sum to T: values are
            not checked.
        activation: alpha, limit and offset.
        backend: one of ``backends.BACKENDS``; None takes the best for the device.

    Returns:
        ``[T, I]`` in the dtype of ``gate_up``.

    Raises:
        ValueError: the tensors do not belong together, or the backend does not run here.

    """
    _check("gate_up", gate_up, bias, counts)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)} has no two halves, gate and up")
    kernels = backends.load("experts.grouped", gate_up.device, backend)
    made: Tensor = _Gated.apply(gate_up, bias, counts, activation, kernels)  # type: ignore[no-untyped-call]
    return made


def weighed(
    y: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    shares: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``(y + bias[expert of the row]) * shares``: what goes into the sums over a token's experts.

    Float32 inside, gradients too, with sums in an order that does not change. Nothing waits for a GPU.

    Args:
        y: ``[T, H]``; bfloat16, float16 or float32, as the next two and the last.
        bias: ``[E, H]``, or None.
        counts: int64 ``[E]``, as :func:`gated` takes them.
        shares: ``[T]``.
        backend: as above.

    Returns:
        ``[T, H]`` in the dtype of ``y``.

    Raises:
        ValueError: the tensors do not belong together, or the backend does not run here.

    """
    _check("y", y, bias, counts)
    if shares.shape != y.shape[:1] or shares.dtype not in _DTYPES or shares.device != y.device:
        raise ValueError(
            f"shares are {shares.dtype} {list(shares.shape)} on {shares.device}, and must be "
            f"floats {list(y.shape[:1])} on {y.device}"
        )
    kernels = backends.load("experts.grouped", y.device, backend)
    made: Tensor = _Weighed.apply(y, bias, counts, shares, kernels)  # type: ignore[no-untyped-call]
    return made


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        bias: Tensor | None,
        counts: Tensor,
        activation: Activation,
        kernels: Any,
    ) -> Any:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, bias, counts)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels.gated(gate_up, bias, counts, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate_up, bias, counts = ctx.saved_tensors
        found = ctx.kernels.gated_back(gradient.contiguous(), gate_up, bias, counts, ctx.activation)
        return (*found, None, None, None)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, counts: Tensor, shares: Tensor, kernels: Any
    ) -> Any:
        y = y.contiguous()
        ctx.save_for_backward(y, bias, counts, shares)
        ctx.kernels = kernels
        return kernels.weighed(y, bias, counts, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        for_y, for_bias, for_shares = ctx.kernels.weighed_back(
            gradient.contiguous(), *ctx.saved_tensors
        )
        return for_y, for_bias, None, for_shares, None


def _check(name: str, rows: Tensor, bias: Tensor | None, counts: Tensor) -> None:
    """Shapes, dtypes, devices; no values, which a GPU would have to be waited for."""
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {rows.dtype} {list(rows.shape)}, and must be rows in bfloat16, float16 or "
            "float32"
        )
    if (
        counts.dim() != 1
        or not len(counts)
        or counts.dtype != torch.int64
        or counts.device != rows.device
    ):
        raise ValueError(
            f"counts are {counts.dtype} {list(counts.shape)} on {counts.device}, and must be int64 "
            f"[E] on {rows.device}"
        )
    if bias is None:
        return
    wanted = (len(counts), rows.shape[1])
    if bias.shape != wanted or bias.dtype not in _DTYPES or bias.device != rows.device:
        raise ValueError(
            f"the bias is {bias.dtype} {list(bias.shape)} on {bias.device}, and must be floats "
            f"{list(wanted)} on {rows.device}"
        )
