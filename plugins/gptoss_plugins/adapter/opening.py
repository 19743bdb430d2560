"""Opening an adapter of either format, for a model that it must fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import FLOATS
from gptoss_convert.errors import (
    CheckpointError,
    ConvertError,
    NoCheckpointError,
    PlanError,
    PluginError,
    UsageError,
)
from gptoss_convert.fit import Fitter
from gptoss_convert.logical import Logical, read
from gptoss_convert.opening import Choice, open_source
from gptoss_convert.pieces import Piece
from gptoss_convert.plan import make_step, to_megatron
from gptoss_convert.scratch import Scratch
from gptoss_plugins.adapter.megatron_targets import in_megatron
from gptoss_plugins.adapter.peft import PeftSource
from gptoss_plugins.adapter.peft_config import CONFIG
from gptoss_plugins.adapter.peft_targets import in_peft
from gptoss_plugins.adapter.table import adapter_family, lines
from gptoss_plugins.megatron.keys import ADAPTER
from gptoss_plugins.megatron.source import TorchDistSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.fit import Direction
    from gptoss_convert.plan import Step
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Config, ModelFamily, Side, TensorSource
    from gptoss_plugins.adapter.table import Target


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Attributes:
        logical: its tensors, as a checkpoint of a family of its own.
        targets: what it adapts, in the table's order.
        rank, alpha: what it was made with. Its scale is alpha / rank, whatever rank its tensors have:
            those of fused modules may be higher.
        base: how the model is called that it was made for; "" if nothing says.

    """

    logical: Logical
    targets: Sequence[Target]
    rank: int
    alpha: float
    base: str
    _steps: Mapping[tuple[str, int | None], Step] = field(repr=False, default_factory=dict)

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank

    def alpha_of(self, rank: int) -> float:
        """The alpha that gives another rank the same scale."""
        return self.alpha * rank / self.rank

    def require_side(self, side: Side) -> None:
        """Raise UsageError unless it is in PEFT's form (``hf``), or in Megatron's."""
        if self.logical.side == side:
            return
        here, way = ("PEFT", "import") if side == "megatron" else ("Megatron", "export")
        raise UsageError(
            f"{self.logical.source.path}: is in {here}'s form already; adapter {way} takes it to the other"
        )

    def factors(self, target: Target, layer: int) -> tuple[Tensor, Tensor]:
        """A and B of a target on a layer."""
        return self.factor(target, "linear_in", layer), self.factor(target, "linear_out", layer)

    def factor(self, target: Target, name: str, layer: int) -> Tensor:
        """A factor of one layer, as Megatron has it: float32 ``[r, in]``, ``[out, r]``, or, with an
        adapter for each expert, ``[E, r, in]`` or ``[E, out, r]``.

        Args:
            target: of what.
            name: ``linear_in`` (A) or ``linear_out`` (B).
            layer: of which layer.

        Raises:
            CheckpointError: it holds NaN or infinity, or what is infinite in float32.

        """
        step = self._steps[target.name(name), layer]
        piece = Piece(step, 0, step.units, 0)
        part = read(self.logical, piece, Scratch(), in_order=True)
        if self.logical.side == "megatron":
            made = part.tensors[0]
        else:
            made = step.rule.op.forward(part.tensors).reshape(step.outputs[0].spec.shape)
        made = made.float()
        if not bool(made.isfinite().all()):
            where = f"{self.logical.source.path}: {step.inputs[0].name}"
            raise CheckpointError(
                f"{where}: holds NaN, infinity or numbers beyond float32; train the adapter again"
            )
        return made


def open_adapter(
    path: str | Path, family: ModelFamily, config: Config, registry: Registry, model: str
) -> Adapter:
    """Open an adapter and hold it against a model.

    Args:
        path: a folder, or a hub id.
        family: of the model.
        config: of the model.
        registry: the plugins.
        model: how the model is called, for messages.

    Raises:
        PlanError: it does not fit the model, listing why, or it is not whole.
        ConvertError: it is no adapter, or none that can be carried over.

    """
    source = _open(path, registry)
    layers = to_megatron(family, config, model)["num_layers"]
    table = lines(family, config)
    is_peft = isinstance(source, PeftSource)
    found = (
        in_peft(source, table, layers, model)
        if isinstance(source, PeftSource)
        else in_megatron(source, table, layers, model)
    )
    logical = _fit(found.source, adapter_family(family, found.targets), config, layers, is_peft)
    if logical.problems:
        problems = [
            problem.replace("the tensor or the config is another model's", f"it is not for {model}")
            for problem in logical.problems
        ]
        raise PlanError(str(source.path), problems)
    steps = {(step.rule.megatron, step.layer): step for step in logical.steps.values()}
    return Adapter(logical, found.targets, found.rank, found.alpha, found.base, steps)


def adapter_source(path: str, registry: Registry) -> TensorSource | None:
    """The source of an adapter; None if there is none by that name that can be read."""
    try:
        source = open_source(path, registry=registry)
    except ConvertError:
        return None
    if isinstance(source, PeftSource):
        return source
    is_trained = isinstance(source, TorchDistSource) and any(
        ADAPTER in name for name in source.specs()
    )
    return source if is_trained else None


def _open(path: str | Path, registry: Registry) -> TensorSource:
    """The adapter of a folder that may hold its model, too."""
    try:
        return open_source(path, registry=registry)
    except PluginError:
        return open_source(path, registry=registry, choice=Choice(format="peft"))
    except NoCheckpointError:
        folder = Path(path).expanduser()
        names = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        if not names:
            raise
        raise CheckpointError(
            f"{folder}: holds no adapter itself; name the one in it that you mean ({', '.join(names)})"
        ) from None


def _fit(
    source: TensorSource, family: ModelFamily, config: Config, layers: int, is_peft: bool
) -> Logical:
    direction: Direction = "import" if is_peft else "export"
    fitter = Fitter(source.specs(), None, ())
    drafts = list(fitter.fit(family.rules(config), layers, direction))
    fitter.finish(direction)
    fitter.problems += [
        f"{i.name}: is {i.spec.dtype}, and no floating-point type; save the adapter again"
        for draft in drafts
        for i in draft.inputs
        if i.spec.dtype not in FLOATS
    ]
    steps = {tuple(d.hf): make_step(d, d.inputs[0].spec.dtype, direction) for d in drafts}
    return Logical(
        source,
        "peft" if is_peft else "torch_dist",
        "hf" if is_peft else "megatron",
        family,
        config,
        None,
        {"num_layers": layers},
        steps,
        tuple(fitter.problems),
    )
