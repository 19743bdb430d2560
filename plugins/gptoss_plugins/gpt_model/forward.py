"""A model's logits, through its pipeline if it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch import Tensor


@torch.no_grad()
def logits(chunks: Sequence[GPTModel], ids: Tensor) -> Tensor | None:
    """Logits of a prompt; all ranks call this together.

    Args:
        chunks: this rank's, in order.
        ids: int64 ``[batch, tokens]``, the same on all ranks.

    Returns:
        ``[batch, tokens, vocabulary]`` on the ranks of the last stage, None elsewhere.

    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    for chunk in chunks:
        chunk.eval()
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        made: Tensor = chunks[0](ids, positions, None)
        return made
    outputs: list[Tensor] = []

    def step(_: Any, part: GPTModel) -> Any:
        def keep(output: Tensor, **__: Any) -> Tensor:
            outputs.append(output)
            return output

        return part(ids, positions, None), keep

    # An interleaved pipeline wants as many microbatches as stages, at least; all are this prompt.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=stages if len(chunks) > 1 else 1,
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if outputs else None
