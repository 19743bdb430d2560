"""Core attention with a learned sink per head and, on some layers, a sliding window.

Shape letters: s query and t key positions, b batch, n query heads, g key/value groups,
r = n / g heads per group, d channels of a head. Heads are those of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from gptoss_plugins.gpt_model.config import GptOssConfig


class SinkAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """softmax(q k / sqrt(d), sink) v, where the sink takes probability but gives no value.

    megatron-core's ``DotProductAttention`` computes the same and owns the same parameter
    ``softmax_offset``, but on CUDA only and with all scores in memory. Queries go in blocks here:
    a block sees only the keys up to its end, and from its window's start.

    Source of the formula: transformers ``models/gpt_oss/modeling_gpt_oss.py``,
    ``eager_attention_forward``.
    """

    query_block = 1024

    def __init__(
        self,
        config: GptOssConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.left: int | None = config.window_size[0] if windowed else None
        self.softmax_offset = self._sinks(config)

    def _sinks(self, config: GptOssConfig) -> nn.Parameter | None:
        """Sink logits ``[n]`` in the parameters' dtype; None where there is nothing to learn."""
        if config.softmax_type != "learnable":
            return None
        heads = config.num_attention_heads // self.tp_group.size()
        sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(sinks, True, 0, 1)
        if config.perform_initialization:
            config.init_method(sinks)
        return sinks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend causally; the last query sits at the last key, so s may be less than t (cache).

        Args:
            query: ``[s, b, n, d]``.
            key: ``[t, b, g, d]``.
            value: ``[t, b, g, d]``.
            attention_mask: bool, broadcast to ``[b, 1, s, t]``; True hides, beyond what
                causality and the window hide anyway.
            attn_mask_type: ignored; GPT-OSS is causal on every layer.
            attention_bias: not supported.
            packed_seq_params: not supported; give a block-diagonal ``attention_mask``.

        Returns:
            ``[s, b, n * d]`` in the dtype of ``value``.

        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SinkAttention takes neither a bias nor packed sequences")
        blocks = [
            self._block(query[i : i + self.query_block], key, value, attention_mask, i, len(query))
            for i in range(0, len(query), self.query_block)
        ]
        return torch.cat(blocks)

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, i: int, s: int
    ) -> Tensor:
        """Output rows of the queries that start at row ``i`` of ``s``."""
        first = len(key) - s + i  # the key position of the block's first query
        stop = first + len(query)
        start = 0 if self.left is None else max(0, first - self.left)
        hidden = self._hidden(first, start, stop, query.device)
        if mask is not None:
            rows = mask[..., i : i + len(query), :] if mask.shape[-2] > 1 else mask
            hidden = hidden | rows[..., start:stop]
        return self._attend(query, key[start:stop], value[start:stop], hidden)

    def _hidden(self, first: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Key positions start..stop that queries first..stop may not see: bool ``[s, t]``."""
        at = torch.arange(first, stop, device=device)[:, None]
        of = torch.arange(start, stop, device=device)[None, :]
        return of > at if self.left is None else (of > at) | (of < at - self.left)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        s, b, n, d = query.shape
        t, g = key.shape[0], key.shape[2]
        # [s, b, n, d] -> [b, g, r * s, d]: the heads of a group share its keys without a copy.
        q = query.reshape(s, b, g, n // g, d).permute(1, 2, 3, 0, 4).reshape(b, g, -1, d)
        scores = torch.matmul(q, key.permute(1, 2, 3, 0)).view(b, n, s, t).float() * self.scale
        probs = self._softmax(scores.masked_fill(hidden, float("-inf"))).to(value.dtype)
        out = torch.matmul(probs.reshape(b, g, -1, t), value.permute(1, 2, 0, 3))
        return out.view(b, n, s, d).permute(2, 0, 1, 3).reshape(s, b, n * d)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Over keys and sink; float32 ``[b, n, s, t]`` in and out, the sink's share left out."""
        if self.config.softmax_type == "vanilla":
            return scores.softmax(dim=-1)
        b, n, s, _ = scores.shape
        sinks = scores.new_zeros(n) if self.softmax_offset is None else self.softmax_offset.float()
        logits = torch.cat([scores, sinks.view(1, n, 1, 1).expand(b, n, s, 1)], dim=-1)
        return logits.softmax(dim=-1)[..., :-1]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """``softmax_offset`` under its own name, cut along the heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class GptOssSelfAttention(SelfAttention):  # type: ignore[misc]  # megatron-core is untyped
    """SelfAttention whose key/value cache lives with the weights; stock: on CUDA, always."""

    def _allocate_memory(
        self, length: int, batch: int, channels: int, dtype: torch.dtype
    ) -> Tensor:
        """Uninitialised cache ``[length, batch, groups of this rank, channels]``."""
        shape = (length, batch, self.num_query_groups_per_partition, channels)
        return torch.empty(shape, dtype=dtype, device=self.linear_qkv.weight.device)
