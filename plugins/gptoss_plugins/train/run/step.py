"""One step: microbatches forth and back through the pipeline, gradients summed, weights changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from gptoss_plugins.train.run.clipping import clip, gradient_norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from gptoss_plugins.train.run.trainee import Trainee


class Batch(NamedTuple):
    """A microbatch on its rank's device.

    Attributes:
        tokens, labels: int64 ``[b, s]``.
        mask: float32 ``[b, s]``: 1 where the label is learned, 0 elsewhere.

    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor


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
    if trainee.live.place.type == "cpu":  # where megatron-core takes no norm
        norm = gradient_norm(trainee.chunks)
        clip(trainee.chunks, norm, trainee.clips)
        trainee.optimizer.step()
    else:
        _, norm, _ = trainee.optimizer.step()
    trainee.scheduler.step(increment=1)
    return Found(loss, float(norm))


@torch.no_grad()
def evaluate(trainee: Trainee, batches: Sequence[Batch]) -> float:
    """The mean loss of microbatches, without learning from them."""
    for chunk in trainee.chunks:
        chunk.eval()
    return _run(trainee, batches, forward_only=True)


def _run(trainee: Trainee, batches: Sequence[Batch], *, forward_only: bool) -> float:
    """The mean loss over all data-parallel ranks' microbatches; all ranks get it."""
    rows, length = batches[0].tokens.shape
    several = len(trainee.chunks) > 1
    made = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(batches) for _ in trainee.chunks] if several else iter(batches),
        model=trainee.chunks if several else trainee.chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    place = batches[0].tokens.device
    total = torch.zeros(2, dtype=torch.float64, device=place)
    for one in made or ():
        total += torch.stack([one["loss"].double(), torch.ones((), device=place).double()])
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1])


def _forward(batches: Iterator[Batch], model: Any) -> Any:
    """What megatron-core's schedules call for each microbatch and chunk."""
    batch = next(batches)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    output = model(batch.tokens, positions.expand_as(batch.tokens), None, labels=batch.labels)

    def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = (losses.float() * batch.mask).sum() / batch.mask.sum()
        # The schedule divides what it is given in place, so it gets a copy of its own.
        return mean, {"loss": mean.detach().clone()}

    return output, loss
