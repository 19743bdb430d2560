"""The experts of one rank: two grouped linears around GPT-OSS's clamped, gated activation.

Stock ``SequentialMLP`` cannot train with biases (an in-place addition to a view), ``GroupedMLP``
has neither biases nor this activation, and ``TEGroupedMLP`` needs Transformer Engine.

Shape letters: E experts of this rank, T tokens sorted by expert (one row for each pair of token and
chosen expert), H hidden, I width of an expert; K inputs and N outputs of a linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from gptoss_kernels.experts import Activation, grouped
from gptoss_plugins.gpt_model.config import SIGMOID_SCALE
from gptoss_plugins.gpt_model.dialects import stack_experts
from gptoss_plugins.gpt_model.expert_shards import ExpertRange, empty_extra_states, stack_factory

if TYPE_CHECKING:
    from gptoss_plugins.gpt_model.config import GptOssConfig


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Row t of ``x`` times the weight of its expert.

    Args:
        x: ``[T, K]``, sorted by expert.
        weight: ``[E, N, K]``.
        counts: rows of each expert, int64 ``[E]``.

    Returns:
        ``[T, N]`` in the dtype of ``x``.

    """
    if _one_kernel(x, weight):
        ends = counts.to(x.device).cumsum(0).to(torch.int32)
        made: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return made
    # unbind and not weight[e]: the gradient is then one stack, not E tensors of full size
    parts = zip(torch.split(x, counts.tolist()), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, w) for rows, w in parts])


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: bfloat16 on CUDA, rows of 16 bytes."""
    fits = x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and hasattr(F, "grouped_mm")
    return fits and all(n % 8 == 0 for n in weight.shape[1:])


def mark_expert(parameter: nn.Parameter) -> None:
    """Say that a parameter is of a rank's own experts."""
    # Reduce gradients over the ranks that hold the same experts. Stock modules say so only
    # if EP > 1; with TP > 1 and EP = 1 their gradients then miss a part, silently.
    parameter.allreduce = False  # type: ignore[attr-defined]
    # Experts may be spread over tensor-parallel ranks, and the norm of gradients otherwise counts
    # what is on the first of those only.
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)


class GroupedLinear(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """E linears in two stacked parameters, ``weight [E, N, K]`` and ``bias [E, N]``.

    The bias is added by what comes next, which passes over all rows anyway.
    """

    def __init__(
        self, config: GptOssConfig, inputs: int, outputs: int, halves: int, experts: ExpertRange
    ) -> None:
        super().__init__(config)
        self.halves, self.experts = halves, experts
        self.weight = self._parameter(outputs, inputs)
        self.bias = self._parameter(outputs) if config.add_bias_linear else None
        if config.perform_initialization:
            self._draw()

    def _parameter(self, *sizes: int) -> nn.Parameter:
        cuda = None if self.config.use_cpu_initialization else "cuda"
        shape = (self.experts.count, *sizes)
        parameter = nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=cuda))
        mark_expert(parameter)
        return parameter

    @torch.no_grad()
    def _draw(self) -> None:
        """Initial weights. Every rank draws all experts, so that generators stay in step."""
        if self.bias is not None:
            self.bias.zero_()
        spare = torch.empty_like(self.weight[0])
        for number in range(self.experts.total):
            local = number - self.experts.first
            mine = 0 <= local < self.experts.count
            self.config.init_method(self.weight[local] if mine else spare)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """``[T, K]`` and rows per expert ``[E]`` -> ``[T, N]``, without the bias."""
        return grouped_product(x, self.weight, counts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """One key per parameter with a leading expert axis, and the empty extra states."""
        if (metadata or {}).get("singleton_local_shards"):
            raise NotImplementedError("one checkpoint key per expert (singleton_local_shards)")
        shards = empty_extra_states(prefix, self.experts, sharded_offsets)
        for name, stack in self.named_parameters():
            key = f"{prefix}{name}"
            shards[key] = stack_factory(key, stack, self.halves, self.experts, sharded_offsets)
        return shards

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
            del state_dict[key]  # state_dict is load_state_dict's own copy
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class GroupedExperts(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Stands where MoELayer expects its experts; the keys in checkpoints are the stock ones.

    ``linear_fc1`` has the rows ``[gate; up]`` (N = 2I, K = H), ``linear_fc2`` N = H, K = I.

    Attributes:
        load: rows that each expert got in training since somebody took this: int64 ``[E]``.

    """

    def __init__(
        self,
        num_local_experts: int,
        config: GptOssConfig,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        ep, replicas = pg_collection.ep, pg_collection.expt_dp
        experts = ExpertRange(
            first=ep.rank() * num_local_experts,
            count=num_local_experts,
            total=ep.size() * num_local_experts,
            replica=replicas.rank(),
        )
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = GroupedLinear(config, hidden, 2 * width, 2, experts)
        self.linear_fc2 = GroupedLinear(config, width, hidden, 1, experts)
        self.load: Tensor | None = None

    def forward(
        self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """Weighted outputs ``[T, H]`` of tokens ``x [T, H]`` with ``probs [T]``; no bias is left.

        Source of the formula: transformers ``GptOssExperts``.
        """
        if self.training:
            self.load = tokens_per_expert + (0 if self.load is None else self.load)
        counts = tokens_per_expert.to(x.device)
        first, second = self.linear_fc1, self.linear_fc2
        gate_up = first(x, counts)
        if not (self.training and self.config.recompute_activation):
            inner = grouped.gated(gate_up, first.bias, counts, self.activation)
            return grouped.weighed(second(inner, counts), second.bias, counts, probs), None
        kept = CheckpointWithoutOutput(fp8=None)
        inner = kept.checkpoint(
            lambda rows: grouped.gated(rows, first.bias, counts, self.activation), gate_up
        )
        made = second(inner, counts)
        kept.discard_output_and_register_recompute(made)
        return grouped.weighed(made, second.bias, counts, probs), None

    @property
    def activation(self) -> Activation:
        """What is between the two linears."""
        config = self.config
        return Activation(
            SIGMOID_SCALE, config.activation_func_clamp_value, config.glu_linear_offset
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Keys ``<prefix>experts.linear_fc{1,2}.{weight,bias}``, as all stock experts have."""
        shards: dict[str, Any] = {}
        for name, linear in self.named_children():
            mine = linear.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            replace_prefix_for_sharding(mine, f"{prefix}{name}.", f"{prefix}experts.{name}.")
            shards |= mine
        return shards

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Experts may also stand one by one, as in SequentialMLP or in TEGroupedMLP."""
        stack_experts(state_dict, prefix, self.linear_fc1.experts.count)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
