"""One step: microbatches forth and back through the pipeline, gradients summed, weights changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from gptoss_plugins.train.run.clipping import clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from gptoss_plugins.train.run.trainee import Trainee


class Batch(NamedTuple):
    """A microbatch on its rank's device; s tokens of each row are this context-parallel rank's.

    Attributes:
        tokens, labels: int64 ``[b, s]``.
        mask: float32 ``[b, s]``: 1 where the label is learned, 0 elsewhere.
        positions: int64 ``[b, s]``.
        starts: int64 ``[b, whole row]``: where in the row the sequence of each token starts; None if a
            row is one sequence.
        length: tokens of a whole row.

    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    starts: Tensor | None
    length: int


class Found(NamedTuple):
    """What a step found, the same on all ranks.

    Attributes:
        loss: mean over the global batch, nats per token.
        norm: of the gradients, before clipping.

    """

    loss: float
    norm: float


def train_step(trainee: Trainee, batches: Sequence[Batch]) -> Found:
    """Learn from this rank's microbatches. All ranks call this together."""
    for chunk in trainee.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    loss = _run(trainee, batches, forward_only=False)
    trainee.optimizer.prepare_grads()
    norm = clip(trainee.optimizer, trainee.clips, trainee.live.place)
    trainee.optimizer.step_with_ready_grads()
    trainee.scheduler.step(increment=1)
    return Found(float(loss), norm)


@torch.no_grad()
def evaluate(trainee: Trainee, batches: Sequence[Batch]) -> float:
    """The mean loss of microbatches, without learning from them."""
    with trainee.whole_weights():
        for chunk in trainee.chunks:
            chunk.eval()
        return float(_run(trainee, batches, forward_only=True))


def _run(trainee: Trainee, batches: Sequence[Batch], *, forward_only: bool) -> Tensor:
    """The mean loss over all data-parallel ranks' microbatches; all ranks get it."""
    several = len(trainee.chunks) > 1
    made = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(batches) for _ in trainee.chunks] if several else iter(batches),
        model=trainee.chunks if several else trainee.chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].length,
        micro_batch_size=len(batches[0].tokens),
        forward_only=forward_only,
    )
    total = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
    for one in made or ():
        total += torch.stack([one["loss"], one["count"]]).double()
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(total, group=replicas)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    return total[0] / total[1].clamp(min=1)


def _forward(batches: Iterator[Batch], model: Any) -> Any:
    """What megatron-core's schedules call for each microbatch and chunk."""
    batch = next(batches)
    config = model.config
    wanted = {"labels": batch.labels}
    if config.cross_entropy_loss_fusion:
        wanted["loss_mask"] = batch.mask
    output = model(batch.tokens, batch.positions, batch.starts, **wanted)

    def loss(losses: Tensor) -> Any:
        total = losses if losses.dim() == 0 else (losses.float() * batch.mask).sum()
        return (_per_token if config.calculate_per_token_loss else _per_microbatch)(total, batch)

    return output, loss


# The schedule divides what it is given in place, so what is kept for the report are copies.


def _per_token(total: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum, to be divided by how many tokens the global batch learns."""
    count = batch.mask.sum()
    return total, count.int(), {"loss": total.detach().clone(), "count": count}


def _per_microbatch(total: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the microbatch; the schedule takes the mean of those."""
    count = batch.mask.sum()
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:  # of which this rank has a part of each row
        dist.all_reduce(count, group=group)
    mean = total / count.clamp(min=1)
    one = torch.full_like(mean.detach(), 1 / group.size())
    return mean, {"loss": mean.detach().clone(), "count": one}
