"""Adapters in a running model: beside every adapted linear, trained in its place.

A linear keeps its class, name, parameters and keys, and gets a child ``adapter``: ``linear_in`` (A) and
``linear_out`` (B), as Megatron-Bridge calls them. Communication is of rank-sized activations only.

Gradients are summed as megatron-core sums those of its own modules: a factor that tensor parallelism
does not cut sees a part of the sequence only and is marked ``sequence_parallel``; those of each expert
are marked ``allreduce=False``; one that all experts share is a dense weight, since the tokens of all
ranks, spread over the experts of all, are summed over data-parallel and tensor-parallel ranks.

Letters: r rank, s tokens of the sequence, b batch, T tokens sorted by expert, E experts of this rank.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from gptoss_plugins.gpt_model.expert_shards import stack_factory
from gptoss_plugins.gpt_model.experts import GroupedLinear, grouped_product, mark_expert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.gpt_model.live import LiveModel
    from gptoss_plugins.train.config import LoRA


class Factor(nn.Module):
    """A or B: ``weight [outputs, inputs]``, or one for each expert, ``[E, outputs, inputs]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """``[.., inputs] -> [.., outputs]``; with ``counts``, rows of each expert, ``[T, inputs]``."""
        if self.weight.dim() == 2:
            return F.linear(x, self.weight)
        assert counts is not None
        return grouped_product(x, self.weight, counts)


class Adapter(nn.Module):
    """``scale * B A dropout(x)``.

    Args:
        base: the linear that it is beside.
        name: of the linear, for the draw of A.
        lora: rank, scale, dropout.
        seed: of the draw.

    """

    def __init__(self, base: Any, name: str, lora: LoRA, seed: int) -> None:
        super().__init__()
        self.base = (base,)  # no child, or it would be its own grandchild
        self.group = getattr(base, "tp_group", None) or get_tensor_model_parallel_group()
        self.scale = lora.alpha / lora.dim
        self.dropout = nn.Dropout(lora.dropout)
        a, b = self.draw(name, lora, seed)
        self.linear_in, self.linear_out = (
            Factor(factor.to(base.weight.device, base.weight.dtype)) for factor in (a, b)
        )

    def draw(self, name: str, lora: LoRA, seed: int) -> tuple[Tensor, Tensor]:
        """This rank's part of A, which is random, and of B, which is zero; the same in all layouts."""
        raise NotImplementedError

    def forward(self, x: Tensor, *counts: Tensor) -> Tensor:
        """What is added to the linear's output."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Any, metadata: Any
    ) -> dict[str, Any]:
        """Both factors, cut as they are."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.cuts,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return found

    @property
    def cuts(self) -> dict[str, int]:
        """Which factors tensor parallelism cuts, and along which dim."""
        return {}

    def _mark(self) -> None:
        """Say how gradients and norms are summed over tensor-parallel ranks."""
        for name, parameter in self.named_parameters():
            if name in self.cuts:
                set_tensor_model_parallel_attributes(parameter, True, self.cuts[name], 1)
            else:
                parameter.sequence_parallel = self.base[0].config.sequence_parallel  # type: ignore[attr-defined]


class ColumnAdapter(Adapter):
    """Beside a linear whose outputs are spread over tensor-parallel ranks: so are B's rows."""

    cuts = {"linear_out.weight": 0}  # noqa: RUF012

    def draw(self, name: str, lora: LoRA, seed: int) -> tuple[Tensor, Tensor]:
        """A whole, B's rows of this rank."""
        rows, inputs = self.base[0].weight.shape
        return drawn(name, lora.dim, inputs, seed), torch.zeros(rows, lora.dim)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """``[s (its part, with sequence parallelism), b, in] -> [s, b, out's part]``."""
        inner = self.linear_in(self.dropout(x))
        if self.base[0].config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(inner, group=self.group)
        else:
            whole = copy_to_tensor_model_parallel_region(inner, group=self.group)
        found: Tensor = self.linear_out(whole) * self.scale
        return found


class RowAdapter(Adapter):
    """Beside a linear whose inputs are spread over tensor-parallel ranks: so are A's columns."""

    cuts = {"linear_in.weight": 1}  # noqa: RUF012

    def draw(self, name: str, lora: LoRA, seed: int) -> tuple[Tensor, Tensor]:
        """A's columns of this rank, B whole."""
        rows, inputs = self.base[0].weight.shape
        whole = drawn(name, lora.dim, inputs * self.group.size(), seed)
        mine = whole[:, self.group.rank() * inputs :][:, :inputs].clone()
        return mine, torch.zeros(rows, lora.dim)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """``[s, b, in's part] -> [s (its part, with sequence parallelism), b, out]``."""
        inner = self.linear_in(self.dropout(x))
        if self.base[0].config.sequence_parallel:
            whole = reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
        else:
            whole = reduce_from_tensor_model_parallel_region(inner, group=self.group)
        found: Tensor = self.linear_out(whole) * self.scale
        return found


class ExpertAdapter(Adapter):
    """Beside the experts of a rank: one for each."""

    def draw(self, name: str, lora: LoRA, seed: int) -> tuple[Tensor, Tensor]:
        """Those of this rank's experts."""
        count, rows, inputs = self.base[0].weight.shape
        first = self.base[0].experts.first
        each = [drawn(f"{name} {first + n}", lora.dim, inputs, seed) for n in range(count)]
        return torch.stack(each), torch.zeros(count, rows, lora.dim)

    def forward(self, x: Tensor, *counts: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``."""
        inner = self.linear_in(self.dropout(x), *counts)
        found: Tensor = self.linear_out(inner, *counts) * self.scale
        return found

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Any, metadata: Any
    ) -> dict[str, Any]:
        """A leading expert axis, as the weight has; B in the same halves."""
        base = self.base[0]
        halves = {"linear_in": 1, "linear_out": base.halves}
        return {
            (key := f"{prefix}{name}.weight"): stack_factory(
                key, getattr(self, name).weight, count, base.experts, sharded_offsets
            )
            for name, count in halves.items()
        }

    def _mark(self) -> None:
        for parameter in self.parameters():
            mark_expert(parameter)


class SharedAdapter(Adapter):
    """Beside the experts of a rank: one for all of the layer, on whatever rank they are."""

    def draw(self, name: str, lora: LoRA, seed: int) -> tuple[Tensor, Tensor]:
        """Both whole."""
        _, rows, inputs = self.base[0].weight.shape
        return drawn(name, lora.dim, inputs, seed), torch.zeros(rows, lora.dim)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``."""
        found: Tensor = self.linear_out(self.linear_in(self.dropout(x))) * self.scale
        return found


def drawn(name: str, rank: int, inputs: int, seed: int) -> Tensor:
    """A whole A, float32 ``[rank, inputs]``, normal with Xavier's variance ``2 / (inputs + rank)``, as
    Megatron-Bridge draws it; by its name, so that no layout changes it.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(rank, inputs, generator=generator).mul_(math.sqrt(2 / (inputs + rank)))


class _Adapted:
    """What is put before a linear's class: its output has the adapter's added."""

    adapter: Adapter

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        made = super().forward(x, *args, **options)  # type: ignore[misc]
        counts = args[:1] if isinstance(self, GroupedLinear) else ()
        more = self.adapter(x, *counts)
        return (made[0] + more, *made[1:]) if isinstance(made, tuple) else made + more

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The linear's own keys, and the adapter's."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        below = f"{prefix}adapter."
        own = {key: shard for key, shard in own.items() if not key.startswith(below)}
        return own | self.adapter.sharded_state_dict(below, sharded_offsets, metadata)


def add_adapters(live: LiveModel, lora: LoRA, seed: int) -> None:
    """Freeze a model that was just built, and put an adapter beside every linear that has one.

    Args:
        live: the model; its adapters change nothing yet, for B is zero.
        lora: which linears, and how.
        seed: of the draw of A.

    """
    for model in live.models:
        model.requires_grad_(False)
        for layer in model.decoder.layers:
            for name, linear in _linears(layer):
                if name in lora.target_modules:
                    _adapt(linear, f"{layer.layer_number} {name}", lora, seed)
        if model.pre_process:
            model.embedding.register_forward_hook(_needs_gradient)


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    attention, experts = layer.self_attention, layer.mlp.experts
    yield from (("linear_qkv", attention.linear_qkv), ("linear_proj", attention.linear_proj))
    yield from (("linear_fc1", experts.linear_fc1), ("linear_fc2", experts.linear_fc2))


def _adapt(linear: Any, name: str, lora: LoRA, seed: int) -> None:
    if isinstance(linear, GroupedLinear):
        kind: type[Adapter] = SharedAdapter if lora.share_expert_adapters else ExpertAdapter
    elif isinstance(linear, ColumnParallelLinear):
        kind = ColumnAdapter
    else:
        assert isinstance(linear, RowParallelLinear)
        kind = RowAdapter
    linear.adapter = kind(linear, name, lora, seed)
    linear.adapter._mark()
    stock = type(linear)
    linear.__class__ = type(f"Adapted{stock.__name__}", (_Adapted, stock), {})


def _needs_gradient(_: Any, __: Any, embedded: Tensor) -> Tensor:
    """Let what follows be recomputed: that takes an input with a gradient, and no weight has one here."""
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_(True)
    return embedded
