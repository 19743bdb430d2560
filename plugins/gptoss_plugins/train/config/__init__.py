"""A training run, typed and frozen, in the field names of Megatron-Bridge's config.

No module here imports torch. ``recipes`` makes configs, ``overrides`` and ``files`` change and keep
them, ``checks`` finds what does not go together, and the training loop reads them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss_plugins.train.config.adapters import LoRA
from gptoss_plugins.train.config.data import PretrainDataset, SftDataset, TokenizerConfig
from gptoss_plugins.train.config.model import ModelConfig
from gptoss_plugins.train.config.outputs import CheckpointConfig, LoggerConfig
from gptoss_plugins.train.config.precision import NAMED, MixedPrecisionConfig
from gptoss_plugins.train.config.steps import (
    DdpConfig,
    OptimizerConfig,
    RngConfig,
    SchedulerConfig,
    TrainConfig,
)

__all__ = [
    "NAMED",
    "CheckpointConfig",
    "DdpConfig",
    "LoRA",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainDataset",
    "RngConfig",
    "SchedulerConfig",
    "SftDataset",
    "TokenizerConfig",
    "TrainConfig",
    "TrainingConfig",
]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a run is told. Sections are as in Megatron-Bridge's ConfigContainer.

    Attributes:
        model: the model and its layout.
        train: length, batches, evaluation.
        optimizer: megatron-core's optimizer.
        scheduler: how learning rate and weight decay move.
        ddp: megatron-core's DistributedDataParallel.
        dataset: running text, or questions and answers.
        tokenizer: text to tokens.
        checkpoint: where it starts, what is saved.
        logger: what is told.
        mixed_precision: number formats.
        peft: adapters; null trains all weights.
        rng: random numbers.

    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ddp: DdpConfig = field(default_factory=DdpConfig)
    dataset: PretrainDataset | SftDataset = field(default_factory=PretrainDataset)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    peft: LoRA | None = None
    rng: RngConfig = field(default_factory=RngConfig)

    def having(self, **sections: Mapping[str, Any]) -> "TrainingConfig":
        """This config with some fields changed: ``config.having(train={"train_iters": 10})``."""
        parts = {
            name: dataclasses.replace(getattr(self, name), **fields)
            for name, fields in sections.items()
        }
        return dataclasses.replace(self, **parts)
