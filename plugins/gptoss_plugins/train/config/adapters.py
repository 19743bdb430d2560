"""``peft``: low-rank adapters, trained in place of the weights."""

from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Fraction, Positive, Rate


@dataclass(frozen=True)
class LoRA:
    """LoRA: ``y = W x + alpha / dim * B A x``, and only A and B are trained.

    Attributes:
        dim: rank of the adapters.
        alpha: their strength, divided by the rank.
        dropout: part of the adapters' inputs that is set to 0 in training.
        target_modules: which layers have them: of attention linear_qkv and linear_proj, of the
            experts linear_fc1 (gate and up) and linear_fc2 (down).
        share_expert_adapters: all experts of a layer have one adapter together, as is Megatron-Bridge's
            default; false gives one to each.

    """

    dim: Positive = 32
    alpha: Rate = 32.0
    dropout: Fraction = 0.0
    target_modules: tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    share_expert_adapters: bool = True
