"""A mixture of experts: all of it for the few tokens of a decoding step, and parts of it for many.

For many tokens, sorting them by expert and a grouped matrix product is fast: ``gated`` and ``weighed``
are what else there is to do. For few, sorting costs more than it saves, and a product of matrices with
one row wastes the tensor cores that it is made for: ``mix`` reads weights once, where they lie.

Letters: T tokens, K experts that each chose, E experts, H hidden, I width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gptoss_kernels.backends import chosen
from gptoss_kernels.experts.grouped import gated, weighed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Activation", "Weights", "gated", "mix", "runs_on", "weighed"]


class Weights(NamedTuple):
    """Of all experts of a layer, contiguous; biases may be None.

    Attributes:
        fc1: ``[E, 2 * I, H]``, rows ``[gate; up]``.
        bias1: ``[E, 2 * I]``.
        fc2: ``[E, H, I]``.
        bias2: ``[E, H]``.

    """

    fc1: Tensor
    bias1: Tensor | None
    fc2: Tensor
    bias2: Tensor | None


class Activation(NamedTuple):
    """``g * sigmoid(alpha * g) * (u + offset)``, g and u clamped.

    Attributes:
        alpha: of the sigmoid.
        limit: g is at most this, and u between its negative and it; None for no limit.
        offset: added to u.

    """

    alpha: float = 1.702
    limit: float | None = 7.0
    offset: float = 1.0


def runs_on(tensor: Tensor) -> bool:
    """Whether :func:`mix` takes tensors of that device."""
    return chosen("experts", tensor.device) == "triton"


def mix(
    tokens: Tensor, chosen: Tensor, shares: Tensor, weights: Weights, activation: Activation
) -> Tensor:
    """Each token's weighted sum of what its experts make of it.

    Sums are float32, in an order that does not change. Nothing waits for the GPU, and a CUDA graph
    holds for any later values.

    Source of the formula: transformers ``models/gpt_oss/modeling_gpt_oss.py``, ``GptOssExperts``.

    Args:
        tokens: ``[T, H]``, contiguous.
        chosen: int64 ``[T, K]``.
        shares: ``[T, K]``, of any float dtype.
        weights: of the experts.
        activation: between the two linears.

    Returns:
        ``[T, H]`` in the dtype of ``tokens``.

    """
    from gptoss_kernels.experts import triton

    return triton.mix(tokens, chosen, shares, weights, activation)
