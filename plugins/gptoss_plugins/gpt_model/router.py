"""Top-k router whose gate is one matrix product wherever its weights are.

The stock gate moves its weights to CUDA, and in megatron-core 0.16 without Transformer Engine it
ends in a NameError (``te_general_gemm``), on GPUs too. All that follows the logits is stock: the k
largest are chosen, and their softmax weighs the experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

_GATE_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class PlainRouter(TopKRouter):  # type: ignore[misc]  # megatron-core is untyped
    """TopKRouter; parameters ``weight [experts, hidden]`` and ``bias [experts]``, replicated.

    The gate computes in ``moe_router_dtype`` ("fp32", "fp64") or, if that is None, in the dtype of
    its input, as transformers' ``GptOssTopKRouter`` does.
    """

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002  # the parent's name
        """Logits ``[..., experts]`` of hidden states ``[..., hidden]``."""
        dtype = _GATE_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)
