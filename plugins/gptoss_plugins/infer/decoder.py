"""New tokens through the layers of this rank, with a cache of the tokens before them.

The modules are the GPTModel's, adapters and all; what differs from its own forward is what they are
called with: positions per sequence, a cache, the last token's logits only, and experts that are summed
up over ranks instead of tokens that are sent around.

Letters: b sequences, s new tokens, T tokens without padding, R of them on this rank (``sharing.py``),
H hidden, n heads and g key-value groups of this rank, d channels, K experts that a token chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from gptoss_kernels.attention import attend
from gptoss_kernels.experts import Weights, mix, runs_on
from gptoss_plugins.gpt_model.experts import GroupedLinear
from gptoss_plugins.gpt_model.rope import concentration
from gptoss_plugins.infer.cache import Cache, Shape, windows_of
from gptoss_plugins.infer.sharing import Sharing, sharing_of, sums_into_parts

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_plugins.gpt_model.build import GptOssModel


_FEW = 32  # choices of experts


class Decoder:
    """This rank's part of a model, made to continue text. All ranks call its methods together.

    Args:
        model: built for inference: one chunk per stage, no sequence parallelism.
        vocabulary: how many logits count; padding is cut off.

    """

    def __init__(self, model: GptOssModel, vocabulary: int) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.config = model.config
        self._weight = next(model.parameters())
        self._frequencies = model.rotary_pos_emb.inv_freq.to(self._weight.device)
        self._concentration = concentration(model.config)

    @property
    def device(self) -> torch.device:
        """This rank's."""
        device: torch.device = self._weight.device
        return device

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for so many sequences of so many tokens."""
        attentions = [layer.self_attention for layer in self.model.decoder.layers]
        shape = Shape(
            batch,
            capacity,
            windows_of([attention.core_attention.left for attention in attentions]),
            attentions[0].num_query_groups_per_partition,
            self.config.kv_channels,
        )
        return Cache(shape, self._weight.dtype, self.device)

    @torch.no_grad()
    def step(self, ids: Tensor, counts: Tensor, cache: Cache) -> Tensor | None:
        """Read new tokens.

        Args:
            ids: int64 ``[b, s]``; a sequence's own tokens first, then padding, which is any id.
            counts: how many of them are its own: int64 ``[b]``.
            cache: of the tokens before; takes the new ones up.

        Returns:
            the logits of each sequence's last token, float32 ``[b, vocabulary]``, on the ranks of the
            last pipeline stage; None elsewhere. Those of a sequence without new tokens mean nothing.

        """
        own = _own(ids, counts)
        flat = ids.flatten() if own is None else ids.flatten()[own]
        sharing = sharing_of(len(flat))
        with sums_into_parts(self.model, sharing):
            x = self._embedded(flat, sharing)
            rotation = self._rotation(cache.positions(ids.shape[1]))
            for index, layer in enumerate(self.model.decoder.layers):
                qkv, _ = layer.self_attention.linear_qkv(layer.input_layernorm(x))
                room = _spread(qkv[: len(flat)], own, ids.shape)
                seen = self._attended(layer.self_attention, room, rotation, index, counts, cache)
                seen = sharing.even(_gathered(seen, own))
                y, bias = layer.self_attention.linear_proj(seen)
                x = x + (y if bias is None else y + bias)
                x = x + self._mixed(layer.mlp, layer.pre_mlp_layernorm(x), sharing)
        cache.advance(counts)
        last = counts.cumsum(0) - 1 if own is not None else ids.shape[1] * (_range(counts) + 1) - 1
        return self._logits(x, last.clamp(min=0), sharing)

    def _embedded(self, flat: Tensor, sharing: Sharing) -> Tensor:
        """``[R, H]``: of ids ``[T]``, or what the stage before made of them."""
        if self.model.pre_process:
            return sharing.mine(self.model.embedding.word_embeddings(flat))
        shape = (sharing.each, self.config.hidden_size)
        room = torch.empty(shape, dtype=self._weight.dtype, device=self.device)
        dist.recv(room, parallel_state.get_pipeline_model_parallel_prev_rank())
        return room

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[b, s, 1, d/2]`` of positions ``[b, s]``, in the model's dtype."""
        angles = positions[..., None, None].float() * self._frequencies
        turned = (angles.cos(), angles.sin())
        cos, sin = ((part * self._concentration).to(self._weight.dtype) for part in turned)
        return cos, sin

    def _attended(
        self,
        attention: Any,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        index: int,
        counts: Tensor,
        cache: Cache,
    ) -> Tensor:
        """``[b, s, n * d]`` of ``linear_qkv``'s ``[b, s, (n + 2 * g) * d]``."""
        core = attention.core_attention
        groups, d = attention.num_query_groups_per_partition, self.config.kv_channels
        qkv = qkv.unflatten(-1, (groups, -1, d))
        query, key, value = qkv.split([qkv.shape[-2] - 2, 1, 1], dim=-2)
        query = rotated(query.flatten(2, 3), *rotation)
        key = rotated(key.squeeze(3), *rotation)
        seen = cache.put(index, key, value.squeeze(3), counts)
        made: Tensor = attend(
            query,
            seen.key,
            seen.value,
            core.softmax_offset,
            scale=core.scale,
            offset=seen.offset,
            begin=seen.begin,
            window=seen.window,
        )
        return made.flatten(2)

    def _mixed(self, moe: Any, tokens: Tensor, sharing: Sharing) -> Tensor:
        """The weighted sum of each token's K experts: ``[R, H]`` of ``[R, H]``."""
        group = parallel_state.get_expert_model_parallel_group()
        are_shared = sharing.ranks > 1  # what each rank has is to pass by the experts of all
        if are_shared:
            tokens = gather_from_sequence_parallel_region(tokens, group=group)
        logits = moe.router.gating(tokens)
        best, chosen = logits.topk(self.config.moe_router_topk, dim=-1)
        shares = best.softmax(-1, dtype=torch.float32)
        if self._are_few(tokens, chosen) and (weights := _plain(moe.experts)):
            return mix(tokens, chosen, shares, weights, moe.experts.activation)
        mixed = self._by_experts(moe.experts, tokens, chosen, shares.to(tokens.dtype))
        if are_shared:
            part: Tensor = reduce_scatter_to_sequence_parallel_region(mixed, group=group)
            return part
        if group.size() > 1:
            dist.all_reduce(mixed, group=group)
        return mixed

    def _are_few(self, tokens: Tensor, chosen: Tensor) -> bool:
        """Whether reading each choice's weights beats sorting the choices by expert."""
        return chosen.numel() <= _FEW and runs_on(tokens)

    def _by_experts(self, experts: Any, tokens: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """What the experts of this rank add: ``[T, H]``, of choices and shares ``[T, K]``.

        Sums go token by token and not by adding up in place, whose order on a GPU is left to chance.
        """
        here = experts.linear_fc1.experts
        local = chosen.flatten() - here.first
        order = local.argsort(stable=True)
        counts = (local == torch.arange(here.count, device=local.device)[:, None]).sum(1)
        if here.count < here.total:  # those of other ranks' experts stand before and behind
            start, count = torch.stack([(local < 0).sum(), counts.sum()]).tolist()
            order = order[start : start + count]
        rows = tokens[order // chosen.shape[1]]
        made, _ = experts(rows, counts, shares.flatten()[order])
        placed = made.new_zeros((local.numel(), tokens.shape[1]))
        placed[order] = made
        summed: Tensor = placed.view(*chosen.shape, -1).sum(1)
        return summed

    def _logits(self, x: Tensor, last: Tensor, sharing: Sharing) -> Tensor | None:
        """Of some of the T tokens, ``x [R, H]``; None, and all go on, if this is not the last stage."""
        if not self.model.post_process:
            dist.send(x.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        ends = self.model.decoder.final_layernorm(sharing.whole(x)[last])
        logits, _ = self.model.output_layer(ends[:, None], runtime_gather_output=True)
        found: Tensor = logits[:, 0, : self.vocabulary].float()
        return found


def _plain(experts: Any) -> Weights | None:
    """The weights, if all experts are here, and nothing was added to what computes with them."""
    fc1, fc2 = experts.linear_fc1, experts.linear_fc2
    are_all_here = fc1.experts.count == fc1.experts.total
    if not type(fc1) is type(fc2) is GroupedLinear or not are_all_here:
        return None
    return Weights(fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def _range(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _own(ids: Tensor, counts: Tensor) -> Tensor | None:
    """Where in ``[b * s]`` the sequences' own tokens are; None where padding is not worth a look.

    Only attention needs sequences side by side: all else can leave their padding out.
    """
    if ids.shape[1] == 1 or len(ids) == 1:
        return None
    is_own = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    return is_own.flatten().nonzero()[:, 0]


def _spread(x: Tensor, own: Tensor | None, shape: torch.Size) -> Tensor:
    """Rows ``[T, C]`` -> ``[b, s, C]``, padding zero."""
    if own is None:
        return x.view(*shape, -1)
    room = x.new_zeros((shape.numel(), x.shape[-1]))
    room[own] = x
    return room.view(*shape, -1)


def _gathered(x: Tensor, own: Tensor | None) -> Tensor:
    """The inverse of ``_spread``."""
    flat = x.flatten(0, 1)
    return flat if own is None else flat[own]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + d/2 of heads ``[b, s, n, d]`` turned by their position's angle.

    Source of the form: transformers ``models/gpt_oss/modeling_gpt_oss.py``, ``_apply_rotary_emb``.
    """
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
