"""Targets of an adapter in Megatron-Bridge's form: ``linear_in`` and ``linear_out`` beside every linear."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError, ConfigError, PlanError
from gptoss_plugins.adapter.finding import Found, halves, strange
from gptoss_plugins.adapter.peft_config import number_of
from gptoss_plugins.adapter.table import Target
from gptoss_plugins.megatron.folder import RUN_CONFIG
from gptoss_plugins.megatron.keys import ADAPTER
from gptoss_plugins.megatron.runconfig import section_of
from gptoss_plugins.megatron.source import TorchDistSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_convert.types import TensorSource
    from gptoss_plugins.adapter.table import Line

_LAYER = re.compile(r"decoder\.layers\.(\d{1,9})\.")
# Megatron-Bridge's classes of plain LoRA, and settings of them that make it something else.
_PLAIN = ("LoRA", "VLMLoRA")
_OTHER = ("normalize_moe_lora", "experts_shared_outer_loras")


def in_megatron(source: TensorSource, table: Sequence[Line], layers: int, model: str) -> Found:
    """Look at an adapter.

    Args:
        source: of its tensors.
        table: what can be adapted.
        layers: how many the model has.
        model: how it is called, for messages.

    Raises:
        CheckpointError: it is no adapter.
        ConfigError: nothing tells its scale, or it is no plain LoRA.
        PlanError: it is not for this model, or is half an adapter.

    """
    specs, where = source.specs(), str(source.path)
    if not isinstance(source, TorchDistSource) or not any(ADAPTER in name for name in specs):
        raise CheckpointError(
            f"{where}: is no adapter; name a folder of PEFT's, or a torch_dist checkpoint that has one"
        )
    rank, alpha, base = _declared(source)
    targets = []
    for line in table:
        for is_shared in (False, True) if line.experts else (False,):
            name = Target(line, 0, is_shared=is_shared).name("linear_in").replace("{L}", "0")
            if name in specs and len(shape := specs[name].shape) >= 2:
                targets.append(Target(line, shape[-2], is_shared=is_shared))
    problems = [*halves(specs, ".linear_in.", ".linear_out.")]
    problems += [
        f"{target.name('linear_in')}: has a rank of 0; save the adapter again"
        for target in targets
        if not target.rank
    ]
    if targets and rank not in (ranks := sorted({target.rank for target in targets})):
        problems.append(
            f"{RUN_CONFIG}: peft.dim is {rank}, and its tensors are of rank "
            f"{', '.join(map(str, ranks))}; restore it"
        )
    known = {target.name(factor) for target in targets for factor in ("linear_in", "linear_out")}
    for name in specs:
        layer = _LAYER.match(name)
        if ADAPTER not in name:
            problems.append(f"{name}: is no part of an adapter; remove it")
        elif layer and int(layer[1]) >= layers:
            problems.append(
                f"{name}: is of layer {layer[1]}, and {model} has {layers} layers, counted from 0; name "
                f"the model that the adapter was made for"
            )
        elif layer and name.replace(layer[1], "{L}", 1) not in known and not problems:
            problems.append(strange(name, [line.module for line in table]))
    if problems:
        raise PlanError(where, problems)
    return Found(source, tuple(targets), rank, alpha, base)


def _declared(source: TorchDistSource) -> tuple[int, float, str]:
    """Rank, alpha and base, from the run's config."""
    path = source.iteration / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{source.path}: has adapters but no {RUN_CONFIG}, whose section peft tells their scale; "
            f"copy it from where it was trained"
        )
    section = section_of(path, "peft")
    kind = str(section.get("_target_", "LoRA"))[:999].rpartition(".")[2]
    if kind not in _PLAIN:
        raise ConfigError(f"{path}: peft is {kind}; only plain LoRA can be carried over")
    for name in _OTHER:
        if section.get(name):
            raise ConfigError(f"{path}: peft.{name} is not known here; train without it")
    rank = number_of(path, "peft.dim", section.get("dim"), int)
    return rank, number_of(path, "peft.alpha", section.get("alpha"), float), _base(source)


def _base(source: TorchDistSource) -> str:
    """The run's ``pretrained_checkpoint``; "" if it does not tell."""
    try:
        found = section_of(source.iteration / RUN_CONFIG, "checkpoint").get("pretrained_checkpoint")
    except CheckpointError:
        return ""
    return found if isinstance(found, str) else ""
