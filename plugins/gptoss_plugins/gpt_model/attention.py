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

from gptoss_kernels import attention as kernels
from gptoss_plugins.gpt_model import by_blocks, flex
from gptoss_plugins.gpt_model.heads import own_heads, whole_heads, whole_sequences

if TYPE_CHECKING:
    from gptoss_plugins.gpt_model.config import GptOssConfig


class SinkAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """softmax(q k / sqrt(d), sink) v, where the sink takes probability but gives no value.

    megatron-core's ``DotProductAttention`` computes the same and owns the same parameter
    ``softmax_offset``, but on CUDA only and with all scores in memory.
    """

    def __init__(
        self,
        config: GptOssConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
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
            query: ``[s, b, n, d]``; with context parallelism, this and the next two have the
                rank's tokens of each sequence.
            key: ``[t, b, g, d]``.
            value: ``[t, b, g, d]``.
            attention_mask: of rows that hold several sequences, int64 ``[b, t]``: where the
                sequence of each position starts, all rows whole even with context parallelism. Or
                bool, broadcast to ``[b, 1, s, t]``; True hides, beyond what causality and the
                window hide anyway.
            attn_mask_type: ignored; GPT-OSS is causal on every layer.
            attention_bias: not supported.
            packed_seq_params: not supported; see ``attention_mask``.

        Returns:
            ``[s, b, n * d]`` in the dtype of ``value``.

        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SinkAttention takes neither a bias nor packed_seq_params")
        sinks: Tensor | None = self.softmax_offset
        if sinks is None and self.config.softmax_type == "off-by-one":
            sinks = query.new_zeros(query.shape[2])
        if self.cp_group.size() == 1:
            return self._attend(query, key, value, sinks, attention_mask)
        q, k, v = (whole_sequences(part, self.cp_group) for part in (query, key, value))
        made = self._attend(q, k, v, own_heads(sinks, self.cp_group), attention_mask)
        return whole_heads(made, self.cp_group, query.shape[-1])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        how: dict[str, Any] = {"scale": self.scale, "left": self.left}
        if mask is not None and mask.dtype == torch.bool:
            return by_blocks.attend(query, key, value, sinks, hidden=mask, **how)
        if query.is_cuda and mask is None and not torch.is_grad_enabled():
            return self._attend_only(query, key, value, sinks)
        if query.is_cuda and len(query) == len(key):
            return flex.attend(query, key, value, sinks, starts=mask, **how)
        return by_blocks.attend(query, key, value, sinks, starts=mask, **how)

    def _attend_only(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Without a gradient: the kernel of inference, which needs no compiling for each length."""
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        offset = torch.full((query.shape[1],), len(key) - len(query), device=query.device)
        window = None if self.left is None else self.left + 1
        made = kernels.attend(q, k, v, sinks, scale=self.scale, offset=offset, window=window)
        return made.transpose(0, 1).flatten(2)

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
