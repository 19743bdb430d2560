"""A pass's tokens, spread over tensor-parallel ranks wherever a token has no need of the others.

Norms, the router, experts and sums then do each token once. What goes over the bus is gathered before
attention and summed into parts behind it, which together move as much as a sum of the whole would.
Training calls this sequence parallelism.

Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.

Letters: T tokens of a pass, R those of a rank (the last one's end may be padding), H hidden.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gptoss_plugins.gpt_model.build import GptOssModel

_WORTH_SHARING = 64  # tokens of a rank


@dataclass(frozen=True)
class Sharing:
    """Of one pass's tokens.

    Attributes:
        tokens: of the pass.
        ranks: that share them; 1 if each has all of them.

    """

    tokens: int
    ranks: int

    @property
    def each(self) -> int:
        """Tokens of a rank."""
        return -(-self.tokens // self.ranks)

    def mine(self, whole: Tensor) -> Tensor:
        """``[T, H] -> [R, H]``."""
        if self.ranks == 1:
            return whole
        first = parallel_state.get_tensor_model_parallel_rank() * self.each
        return self._padded(whole[first : first + self.each], self.each)

    def whole(self, part: Tensor) -> Tensor:
        """``[R, H] -> [T, H]``, on all ranks."""
        if self.ranks == 1:
            return part
        made: Tensor = gather_from_sequence_parallel_region(part)
        return made[: self.tokens]

    def even(self, whole: Tensor) -> Tensor:
        """``[T, H]`` as a linear takes it that sums into parts: as many tokens for each rank."""
        return self._padded(whole, self.each * self.ranks)

    def _padded(self, x: Tensor, tokens: int) -> Tensor:
        return x if len(x) == tokens else pad(x, (0, 0, 0, tokens - len(x)))


def sharing_of(tokens: int) -> Sharing:
    """What is worth it in this layout, whose experts must not be spread over more ranks than tokens are."""
    ranks: int = parallel_state.get_tensor_model_parallel_world_size()
    spread: int = parallel_state.get_expert_model_parallel_world_size()
    is_worth_it = tokens >= ranks * _WORTH_SHARING and ranks % spread == 0
    return Sharing(tokens, ranks if is_worth_it else 1)


@contextlib.contextmanager
def sums_into_parts(model: GptOssModel, sharing: Sharing) -> Iterator[None]:
    """Attention's linears, and adapters beside them, take and make a rank's part of the tokens."""
    if sharing.ranks == 1:
        yield
        return
    holders = [model.config]
    for layer in model.decoder.layers:
        holders += [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
    for holder in holders:
        holder.sequence_parallel = True
    try:
        yield
    finally:
        for holder in holders:
            holder.sequence_parallel = False
