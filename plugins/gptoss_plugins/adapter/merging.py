"""A model with an adapter added to its weights, as one more checkpoint that can be read.

Whatever reads checkpoints reads this one: conversions in any direction, ``verify``, a running model.
Nothing is merged before it is asked for, and then only the rows that are.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.errors import ConvertError
from gptoss_convert.fit import Input
from gptoss_convert.loss import Loss
from gptoss_convert.pieces import Piece, decoded, read_parts
from gptoss_convert.scratch import Scratch
from gptoss_convert.threads import torch_threads
from gptoss_convert.types import TensorSpec
from gptoss_plugins.adapter.opening import open_adapter
from gptoss_plugins.adapter.ops import swaps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.logical import Logical
    from gptoss_convert.plan import Step
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Rule
    from gptoss_plugins.adapter.opening import Adapter
    from gptoss_plugins.adapter.table import Target

_CHUNK = 3 << 18  # elements at a time, whose float32 a processor's cache holds


class _Adapted(NamedTuple):
    """A tensor of the base that the adapter changes.

    Attributes:
        target: by what.
        step: that reads it, in the base.
        of: which of its inputs it is.
        number: of the input among the step's.
        spec: as it is offered.

    """

    target: Target
    step: Step
    of: Input
    number: int
    spec: TensorSpec


class MergedSource:
    """The base's tensors, those that are adapted decoded and with ``scale * B A`` added.

    Args:
        base: the model.
        adapter: which fits it.
        adapted: by name.

    Attributes:
        rounding: what rounding to a tensor's type has cost so far, by name.

    """

    def __init__(self, base: Logical, adapter: Adapter, adapted: Mapping[str, _Adapted]) -> None:
        self._base, self._adapter, self._adapted = base, adapter, adapted
        self._latest = threading.local()
        self._taking = threading.Lock()
        self.rounding: dict[str, Loss] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base.source, name)

    @property
    def path(self) -> Path:
        """The base's."""
        return self._base.source.path

    @property
    def merged_specs(self) -> Mapping[str, TensorSpec]:
        """Of what the adapter changes."""
        return {name: found.spec for name, found in self._adapted.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's, the adapted ones as they are offered and not in a codec's parts."""
        parts = {part for found in self._adapted.values() for part, _ in found.of.parts}
        rest = {n: spec for n, spec in self._base.source.specs().items() if n not in parts}
        return {**rest, **self.merged_specs}

    def check(self) -> None:
        """Both are whole."""
        self._base.source.check()
        self._adapter.logical.source.check()

    def fingerprint(self) -> str:
        """Of both."""
        adapter = self._adapter.logical.source.fingerprint()
        both = f"{self._base.source.fingerprint()} {adapter} {self._adapter.scale!r}"
        return hashlib.sha256(both.encode()).hexdigest()

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The tensor, or ``rows`` of its dim 0, in memory of ``scratch``."""
        import torch

        found = self._adapted.get(name)
        if found is None:
            return self._base.source.read(name, rows, scratch)
        memory = scratch or Scratch()
        first, stop, _ = (rows or slice(None)).indices(found.spec.shape[0])
        nbytes = found.spec.nbytes // found.spec.shape[0] * (stop - first)
        made = memory.take(nbytes).view(torch_dtype(found.spec.dtype))
        own = self._latest.__dict__.setdefault("scratch", Scratch())  # the thread's, for this alone
        own.reset()
        weight = self._stored(found, first, stop, own)
        left, right = self._factors(found)
        left, right = left[first:stop], right[first:stop] if right.dim() == 3 else right
        is_turned = not weight.is_contiguous() and weight.mT.is_contiguous()
        if is_turned:  # as it is decoded, with the outputs before the inputs; so it goes on
            weight, left, right = weight.mT, right.mT, left.mT
        made = made.view(weight.shape)
        each = max(1, _CHUNK // weight.shape[-1])
        room = own.take(4 * each * weight.shape[-1]).view(torch.float32)
        try:
            with torch_threads():  # the converter's others are busy
                loss = _merge(weight, left, right, self._adapter.scale, made, room.view(each, -1))
        except OverflowError as error:
            raise ConvertError(
                f"{name}: with the adapter it {error}; merge into a wider type"
            ) from None
        if loss.nonfinite and loss.nonfinite > int((~weight.isfinite()).sum()):
            raise ConvertError(
                f"{name}: with the adapter it goes beyond float32; look at the adapter's numbers and alpha"
            )
        with self._taking:
            self.rounding[name] = self.rounding.get(name, Loss()) + loss
        return made.mT if is_turned else made

    def _stored(self, found: _Adapted, first: int, stop: int, scratch: Scratch) -> Tensor:
        """Rows of the base's tensor, decoded."""
        whole = found.spec.shape[0]
        if found.of.codec is not None and not found.of.codec.sliceable:
            first, stop, cut = 0, whole, slice(first, stop)
        else:
            cut = slice(None)
        rows = Piece(replace(found.step, units=whole), first, stop, first)
        parts = read_parts(self._base.source, rows, found.of, scratch)
        return decoded(found.of, parts, scratch, as_is=False)[cut]

    def _factors(self, found: _Adapted) -> tuple[Tensor, Tensor]:
        """L and R of ``scale * L R``, which is added to a tensor as it is stored.

        Each thread keeps those of the weight it is at: its pieces come in a row.
        """
        key, kept = (id(found.target), found.step.layer), self._latest
        if getattr(kept, "key", None) != key:
            kept.key, kept.factors = key, {}  # the old ones are given back first
            kept.factors["a", "b"] = self._adapter.factors(found.target, found.step.layer or 0)
        if found.number not in kept.factors:
            kept.factors[found.number] = self._as_stored(found, *kept.factors["a", "b"])
        pair: tuple[Tensor, Tensor] = kept.factors[found.number]
        return pair

    def _as_stored(self, found: _Adapted, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """L and R from A and B as Megatron has them."""
        rule, experts = found.target.line.rule, found.target.line.experts
        if found.target.is_shared:
            a, b = (factor.expand(experts, *factor.shape) for factor in (a, b))
        return (b, a) if self._base.side == "megatron" else _as_in_hf(rule, found.number, a, b)


def _as_in_hf(rule: Rule, number: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """L and R for a Hugging Face tensor: B goes the way of the weight, as one of r inputs."""
    shape, rank = list(rule.hf.values())[number], a.shape[-2]
    rows = rule.op.inverse(b)[number]
    if swaps(rule.op):  # [.., in, out]
        return a.mT, rows.reshape(*shape[:-2], rank, shape[-1])
    return rows.reshape(*shape[:-1], rank), a


def _merge(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor, room: Tensor
) -> Loss:
    """``out = weight + scale * left right`` in float32, rounded once to the type of ``out``.

    Args:
        weight: ``[m, n]``, or ``[E, m, n]``; so are the others.
        left: ``[m, r]``.
        right: ``[r, n]``.
        scale: a number.
        out: of the shape of ``weight``.
        room: float32 ``[some, n]``; so many rows are at work at a time.

    Raises:
        OverflowError: a finite number became infinite.

    """
    import torch

    from gptoss_kernels.rounded_sum import rounded_sum

    total = Loss(unit="elements")
    if weight.dim() == 3:
        for own, l, r, to in zip(weight, left, right, out, strict=True):
            total += _merge(own, l, r, scale, to, room)
        return total
    for start in range(0, len(weight), len(room)):
        rows = slice(start, start + len(room))
        change = torch.mm(left[rows], right, out=room[: len(weight[rows])])
        cost = rounded_sum(weight[rows], change, scale, out[rows])
        total += Loss(cost.elements, *cost[1:5], cost.elements, cost.nonfinite, "elements")
    return total


def merged(base: Logical, adapter: Adapter, is_exact: Callable[[Rule], bool]) -> Logical:
    """A model with an adapter added.

    Args:
        base: the model.
        adapter: which fits it.
        is_exact: whether the weights of a line are offered in float32, as they are computed; rounded
            to the base's own type otherwise.

    """
    by_rule = {target.line.rule.megatron: target for target in adapter.targets}
    adapted: dict[str, _Adapted] = {}
    steps = dict(base.steps)
    for key, step in base.steps.items():
        target = by_rule.get(step.rule.megatron)
        if target is None:
            continue
        inputs = []
        for number, of in enumerate(step.inputs):
            dtype = "F32" if is_exact(step.rule) else of.spec.dtype
            spec = TensorSpec(of.spec.shape, dtype)
            adapted[of.name] = _Adapted(target, step, of, number, spec)
            inputs.append(Input(of.name, spec, ((of.name, spec),)))
        steps[key] = replace(step, inputs=tuple(inputs))
    source = MergedSource(base, adapter, adapted)
    left = any(i.codec for step in steps.values() for i in step.inputs)
    codec = base.codec if left else None
    # no format of its own name, so nobody reads the base's files past this source
    return replace(
        base, source=source, format=f"{base.format} with an adapter", steps=steps, codec=codec
    )


def with_adapter(base: Logical, path: str | Path, registry: Registry, *, is_exact: bool) -> Logical:
    """A model with the adapter of a folder added, which must fit it.

    Args:
        base: the model.
        path: of the adapter; a folder or a hub id.
        registry: the plugins.
        is_exact: leave adapted weights in float32; round them to the base's type, as a merge does,
            otherwise.

    Raises:
        ConvertError: it is no adapter, or one of another model.

    """
    adapter = open_adapter(path, base.family, base.config, registry, str(base.source.path))
    return merged(base, adapter, lambda _: is_exact)
