"""The softmax and the gradient of cross-entropy over a vocabulary, where the logits lie.

Logits of a large vocabulary are what training needs most memory for. So they are read once for the
softmax's denominator, and become their own gradients; no other tensor of their size is made.

Shape letters: T tokens, V entries of the vocabulary, or one tensor-parallel rank's part of them.

>>> import torch
>>> from gptoss_kernels import cross_entropy
>>> logits = torch.zeros(1, 4)
>>> lse = cross_entropy.logsumexp(logits)  # the loss is lse less the label's logit
>>> cross_entropy.gradient_(logits, torch.tensor([2]), lse, torch.ones(1))
tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels import backends
from gptoss_kernels.backends import BACKENDS

__all__ = ["BACKENDS", "gradient_", "logsumexp"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def logsumexp(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """The logarithm of the softmax's denominator.

    Of ranks that hold parts of the vocabulary, the logsumexp of their results is that of the whole.

    Args:
        logits: ``[T, V]``; bfloat16, float16 or float32, the entries of a row next to each other.
        backend: one of ``BACKENDS``; None takes the best for the device.

    Returns:
        float32 ``[T]``: -inf for a row that is all -inf, inf or NaN for one that has it.

    Raises:
        ValueError: the logits are none, or the backend does not run here.

    """
    _check_logits(logits)
    made: Tensor = backends.load("cross_entropy", logits.device, backend).logsumexp(logits)
    return made


@torch.no_grad()
def gradient_(
    logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """Turn logits into the gradient of ``sum(weights * (lse - logits[label]))``, in place.

    ``logits[t, v] = weights[t] * (exp(logits[t, v] - lse[t]) - (v == labels[t]))``: float32, and
    rounded once.

    Args:
        logits: ``[T, V]``, as :func:`logsumexp` takes them.
        labels: int64 ``[T]``; one outside ``[0, V)`` is another rank's.
        lse: float32 ``[T]``, of the whole vocabulary.
        weights: float32 ``[T]``; where one is 0 the row becomes zeros, whatever its logits are.
        backend: as above.

    Returns:
        The logits.

    Raises:
        ValueError: the tensors do not belong together, or the backend does not run here.

    """
    _check_logits(logits)
    dtypes = {"labels": torch.int64, "lse": torch.float32, "weights": torch.float32}
    for (name, dtype), x in zip(dtypes.items(), (labels, lse, weights), strict=True):
        if x.shape != logits.shape[:1] or x.dtype != dtype or x.device != logits.device:
            raise ValueError(
                f"{name} are {x.dtype} {list(x.shape)} on {x.device}, and must be {dtype} "
                f"{list(logits.shape[:1])} on {logits.device}, as the logits have rows"
            )
    backends.load("cross_entropy", logits.device, backend).gradient_(logits, labels, lse, weights)
    return logits


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in _DTYPES:
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)}, and must be [T, V] in bfloat16, "
            "float16 or float32"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("the logits of a row must be next to each other")
