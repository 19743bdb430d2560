"""Megatron-LM's arguments in a rank's file: the model, and the layout and modules it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_plugins.megatron import sidecars

if TYPE_CHECKING:
    import argparse

    from gptoss_convert.plan import ConversionPlan


def arguments(plan: ConversionPlan, dialect: str) -> argparse.Namespace:
    """What Megatron-LM takes from a checkpoint with ``--use-checkpoint-args``, and more."""
    layout, layers = plan.target.layout, plan.megatron_config["num_layers"]
    args = sidecars.arguments(plan, "torch")
    args.transformer_impl = "transformer_engine" if dialect.startswith("te-") else "local"
    args.moe_grouped_gemm = dialect.endswith("-grouped")
    args.make_vocab_size_divisible_by = layout.vocab_multiple  # so that it pads as we did
    args.num_virtual_stages_per_pipeline_rank = args.virtual_pipeline_model_parallel_size
    args.num_layers_per_virtual_pipeline_stage = None
    args.pipeline_model_parallel_layout = None
    if layout.stages:
        args.pipeline_model_parallel_layout = _stages(layout.stages)
    elif layout.vpp > 1 and layout.first is layout.last is None:
        args.num_layers_per_virtual_pipeline_stage = layers // (layout.pp * layout.vpp)
    return args


def _stages(layers: tuple[int, ...]) -> str:
    """Every chunk as a run of ``t``, with E for the embedding and L for the loss at the ends."""
    return "E" + "|".join("t" * count for count in layers) + "L"
