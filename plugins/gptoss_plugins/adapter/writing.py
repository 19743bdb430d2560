"""Adapters from one format to the other, as conversions of a family of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.conversion import Conversion
from gptoss_convert.dtypes import from_torch_name
from gptoss_convert.plan import Target as Placing
from gptoss_convert.plan import make_plan
from gptoss_plugins.adapter.blocks import simplest
from gptoss_plugins.adapter.peft import PeftSink
from gptoss_plugins.adapter.peft_config import peft_config
from gptoss_plugins.adapter.table import Target, adapter_family
from gptoss_plugins.adapter.torch_dist import AdapterSink, Trained

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.fit import Direction
    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Config, Format, ModelFamily, TensorSink
    from gptoss_plugins.adapter.opening import Adapter


def prepare_adapter_import(
    adapter: Adapter,
    family: ModelFamily,
    config: Config,
    registry: Registry,
    *,
    config_file: Path | None = None,
    base: str | None = None,
    torch_dtype: str | None = None,
    uniform_rank: bool = False,
) -> Conversion:
    """Plan PEFT -> Megatron.

    Args:
        adapter: in PEFT's form.
        family: of the model.
        config: of the model.
        registry: the plugins.
        config_file: where the config stands, to be carried along.
        base: what the checkpoint is to name as the model it is for.
        torch_dtype: element type to write; None keeps the adapter's.
        uniform_rank: give all the highest rank, with zeros.

    """
    targets = list(adapter.targets)
    ranks = [target.rank for target in targets]
    rank = adapter.rank if adapter.rank in ranks else ranks[0]
    if uniform_rank:
        rank = max(ranks)
        targets = [replace(target, padded=rank) for target in targets]
    trained = Trained(
        rank,
        adapter.alpha_of(rank),
        tuple(dict.fromkeys(target.line.linear for target in adapter.targets)),
        any(target.is_shared for target in adapter.targets),
        base or adapter.base or None,
    )

    def create(folder: Path, plan: ConversionPlan) -> TensorSink:
        return AdapterSink(folder, plan, trained)

    files = {"config.json": config_file} if config_file else {}
    stock = registry.formats()["torch_dist"]
    return _conversion(
        "import", adapter, targets, family, config, registry, replace(stock, create=create),
        files, torch_dtype,
    )  # fmt: skip


def prepare_adapter_export(
    adapter: Adapter,
    family: ModelFamily,
    config: Config,
    registry: Registry,
    *,
    base: str | None = None,
    torch_dtype: str | None = None,
) -> Conversion:
    """Plan Megatron -> PEFT; arguments as above.

    B of a fused linear that has a block for each module, and zeros elsewhere, becomes an adapter of
    its own for each; otherwise its modules share A. Both compute the same.
    """
    targets = [simplest(adapter, target) for target in adapter.targets]
    written = _declared(adapter, targets, base or adapter.base or None)

    def create(folder: Path, plan: ConversionPlan) -> TensorSink:
        return PeftSink(folder, plan, written)

    stock = registry.formats()["peft"]
    return _conversion(
        "export", adapter, targets, family, config, registry, replace(stock, create=create), {},
        torch_dtype,
    )  # fmt: skip


def _conversion(
    direction: Direction,
    adapter: Adapter,
    targets: Any,
    family: ModelFamily,
    config: Config,
    registry: Registry,
    target_format: Format,
    files: dict[str, Path],
    torch_dtype: str | None,
) -> Conversion:
    source = adapter.logical.source
    plan = make_plan(
        direction,
        source.specs(),
        adapter_family(family, targets),
        config,
        where=str(source.path),
        dtype=from_torch_name(torch_dtype) if torch_dtype else None,
        files=files,
        target=Placing(),
    )
    return Conversion(plan, source, target_format, registry)


def _declared(adapter: Adapter, targets: list[Target], base: str | None) -> dict[str, Any]:
    """``adapter_config.json``: the most frequent rank is the general one, the others are by name."""
    ranks: dict[str, int] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for target in targets:
        of_parts = target.ranks or itertools.repeat(target.rank)
        for part, rank in zip(target.line.parts, of_parts, strict=False):
            if not rank:
                continue
            name = part.partition("{L}.")[2]
            if not target.line.experts:
                name = name.rpartition(".")[2]
            (parameters if target.line.experts else modules).append(name)
            ranks[name] = rank
    counts = [*ranks.values()]
    usual = max(dict.fromkeys(counts), key=counts.count)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    alphas = {name: adapter.alpha_of(rank) for name, rank in others.items()}
    return peft_config(usual, adapter.alpha_of(usual), modules, parameters, others, alphas, base)
