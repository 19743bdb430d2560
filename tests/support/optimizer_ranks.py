"""A rank whose optimizer's state goes into a checkpoint and comes back: optimizer_ranks.py FOLDER EP.

Each way, our own code and megatron-core's write and read; prints how many elements were compared.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from gptoss_convert.registry import default_registry
from gptoss_plugins.gpt_model.world import world_of
from gptoss_plugins.train.choosing import chosen
from gptoss_plugins.train.ranks import layout_of
from gptoss_plugins.train.run import optimizer_state
from gptoss_plugins.train.run.adam import Adam
from gptoss_plugins.train.run.clipping import parts_of
from gptoss_plugins.train.run.saving import Progress, resume, save
from gptoss_plugins.train.run.trainee import Trainee, build_trainee

METHODS = (
    "sharded_param_state_fully_reshardable",
    "load_parameter_state_from_fully_reshardable",
)
BY = {
    "ours": {name: getattr(optimizer_state, name) for name in METHODS},
    "megatron-core": {name: getattr(DistributedOptimizer, name) for name in METHODS},
}
# With several buckets megatron-core 0.16's own writer loses count of the space between them.
WAYS = (
    (True, "ours", "ours"),
    (True, "ours", "megatron-core"),
    (False, "megatron-core", "ours"),
)


def states(trainee: Trainee) -> list[tuple[Adam, Any]]:
    """The optimizer of each parameter that this rank has a part of."""
    return [
        (part.optimizer, param)
        for part in parts_of(trainee.optimizer)
        for group in part.optimizer.param_groups
        for param in group["params"]
    ]


@torch.no_grad()
def fill(trainee: Trainee, make: Any) -> None:
    """Every state with values of its own."""
    for optimizer, param in states(trainee):
        optimizer.initialize_state(param)
        state = optimizer.state[param]
        param.copy_(make(param.shape))
        state["exp_avg"].copy_(make(param.shape))
        state["exp_avg_sq"].copy_(make(param.shape).square())
        if param.dtype == torch.bfloat16:
            state["master_param"].copy_((make(param.shape) * 1000).short())


def content(trainee: Trainee) -> list[torch.Tensor]:
    """All of it."""
    found = []
    for optimizer, param in states(trainee):
        found.append(param.detach().clone())
        found += [value.detach().clone() for _, value in sorted(optimizer.state[param].items())]
    return found


def main() -> None:
    """Write and read by both."""
    folder, ep = Path(sys.argv[1]), int(sys.argv[2])
    Adam.get_unscaled_state = (  # type: ignore[attr-defined]  # what megatron-core's own code asks for
        lambda self, param, name: self.stored_state(param, name, slice(None)).float()
    )
    registry = default_registry()
    words = [
        f"model.expert_model_parallel_size={ep}",
        "model.hidden_size=40",
        "mixed_precision=bf16_mixed",
        "optimizer.use_distributed_optimizer=true",
        "optimizer.exp_avg_dtype=bf16",
        "ddp.bucket_size=3001",
    ]
    config = chosen(registry.recipes(), "tiny_pretrain_config", None, words)
    with world_of(layout_of(config.model), "cpu") as place:
        compared = 0
        for overlap, writer, reader in WAYS:
            one = config.having(ddp={"overlap_grad_reduce": overlap})
            trainee = build_trainee(one, registry, place, random_weights=True)
            compared += there_and_back(trainee, writer, reader, folder / f"{writer} {reader}")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, compared)
        if dist.get_rank() == 0:
            print(everyone)


def there_and_back(trainee: Trainee, writer: str, reader: str, root: Path) -> int:
    """How many elements came back as they were, if all did."""
    draws = torch.Generator().manual_seed(dist.get_rank())
    fill(trainee, lambda shape: torch.randn(shape, generator=draws))
    wanted = content(trainee)
    vars(optimizer_state).update(BY[writer])
    save(root, trainee, Progress(3, 7), {}, {}, with_optimizer=True, shared=True, keep=1)
    fill(trainee, torch.zeros)
    vars(optimizer_state).update(BY[reader])
    resume(root / "iter_0000003", trainee, with_optimizer=True)
    for found, value in zip(content(trainee), wanted, strict=True):
        assert torch.equal(found, value), (writer, reader, found.shape)
    return sum(value.numel() for value in wanted)


if __name__ == "__main__":
    main()
