"""``mixed_precision``: number formats, with Megatron-Bridge's names for sets of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Natural


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """The formats that products are computed in; the optimizer's weights are always float32.

    Attributes:
        bf16: weights and activations in bfloat16; else all is float32.
        fp8: format of products: e4m3, or hybrid, which takes e5m2 for gradients; null for none.
            Needs Transformer Engine.
        fp8_recipe: how FP8 is scaled: tensorwise by the tensor's largest value (Hopper), mxfp8 in
            blocks of 32 (Blackwell).
        fp8_param_gather: data-parallel ranks exchange weights in FP8.
        reuse_grad_buf_for_mxfp8_param_ag: do so in the memory of the gradients; mxfp8 with
            ``fp8_param_gather`` needs it.
        first_last_layers_bf16: keep the first and last layers out of FP8.
        num_layers_at_start_in_bf16: how many first ones.
        num_layers_at_end_in_bf16: how many last ones.

    """

    bf16: bool = True
    fp8: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: Literal["tensorwise", "mxfp8"] = "tensorwise"
    fp8_param_gather: bool = False
    reuse_grad_buf_for_mxfp8_param_ag: bool = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: Natural = 0
    num_layers_at_end_in_bf16: Natural = 0


NAMED: Mapping[str, MixedPrecisionConfig] = {
    "bf16_mixed": MixedPrecisionConfig(),
    "bf16_with_fp8_current_scaling_mixed": MixedPrecisionConfig(
        fp8="hybrid",
        fp8_param_gather=True,
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
    ),
    "bf16_with_mxfp8_mixed": MixedPrecisionConfig(
        fp8="e4m3",
        fp8_recipe="mxfp8",
        fp8_param_gather=True,
        reuse_grad_buf_for_mxfp8_param_ag=True,
    ),
    "fp32": MixedPrecisionConfig(bf16=False),  # ours
}


def label(precision: MixedPrecisionConfig) -> str:
    """A short name for listings."""
    if not precision.bf16:
        return "float32"
    if not precision.fp8:
        return "bf16"
    return "mxfp8" if precision.fp8_recipe == "mxfp8" else "fp8"
