"""How many processes a layout takes, and what is left for data parallelism."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gptoss_convert.layout import Layout

if TYPE_CHECKING:
    from gptoss_plugins.train.config import ModelConfig, TrainingConfig


def layout_of(model: ModelConfig) -> Layout:
    """The layout of the weights; context parallelism cuts none of them."""
    return Layout(
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size or 1,
        ep=model.expert_model_parallel_size,
        etp=model.expert_tensor_parallel_size,
    )


def smallest_world(model: ModelConfig) -> int:
    """Processes that the layout takes at least; any multiple will do.

    megatron-core takes the expert-parallel ranks out of the tensor-, context- and data-parallel ones.
    """
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    experts = model.expert_model_parallel_size * model.expert_tensor_parallel_size
    return model.pipeline_model_parallel_size * math.lcm(dense, experts)


def data_parallel(model: ModelConfig, world_size: int) -> int:
    """Ranks, of a world that fits, that see different sequences."""
    return world_size // (
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * model.context_parallel_size
    )


def microbatches(config: TrainingConfig, world_size: int) -> int:
    """Microbatches of a step on each rank, in a world that fits."""
    at_once = config.train.micro_batch_size * data_parallel(config.model, world_size)
    return config.train.global_batch_size // at_once
