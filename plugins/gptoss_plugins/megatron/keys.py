"""Parameter names and the keys of a ``torch_dist`` checkpoint.

megatron-core stacks layers: ``decoder.layers.7.X`` is row 7 of the key ``decoder.layers.X``, whose
leading axis is the layer; parameters of experts have the expert as the next axis, under
``mlp.experts.experts.``. Models it calls non-homogeneous keep one key per layer instead; both are
read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import itemsize
from gptoss_convert.layout import EXPERT_AXIS
from gptoss_convert.types import Shard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.plan import Output

STACKED, PER_LAYER = DIALECTS = ("stacked", "per-layer")
_LAYERS = "decoder.layers."
_NUMBERED = re.compile(rf"{re.escape(_LAYERS)}([0-9]{{1,9}})\.(.*)", re.DOTALL)
_LARGEST_CHUNK = 1 << 31  # bytes; a zip entry without 64-bit sizes ends at 4 GiB
ADAPTER = ".adapter."  # stands in all keys of adapters, as Megatron-Bridge calls them
# What a training checkpoint holds besides the model's weights.
OPTIMIZER = ("optimizer.", "chained_")
_STATE = (
    *OPTIMIZER,
    "rng_state",
    "rerun_state",
    "opt_param_scheduler",
    "common_state",
)


@dataclass(frozen=True)
class Place:
    """Where a parameter stands: a key, and the row of the key's layer axis if it has one."""

    key: str
    layer: int | None


@dataclass(frozen=True)
class Chunk:
    """A box of a key's global tensor that is stored in one piece."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def place(name: str, *, stacked: bool = True) -> Place:
    """Parameter name -> its place among stacked keys, or among keys of one layer each."""
    numbered = _NUMBERED.fullmatch(name)
    layer, rest = (int(numbered[1]), numbered[2]) if numbered else (None, name)
    if rest.endswith(EXPERT_AXIS):
        module, parameter = rest.removesuffix(EXPERT_AXIS).split(".experts.", 1)
        rest = f"{module}.experts.experts.{parameter}"
    if layer is not None and not stacked:
        return Place(f"{_LAYERS}{layer}.{rest}", None)
    return Place(_LAYERS + rest if numbered else rest, layer)


def parameter(key: str, layer: int | None, dims: int = 0) -> str:
    """The inverse of :func:`place`; a key of one layer only says so itself.

    A factor of an adapter that is a matrix (``dims`` of one layer's) is of all experts together.
    """
    numbered = _NUMBERED.fullmatch(key)
    rest = numbered[2] if numbered else key.removeprefix(_LAYERS)
    if ".experts.experts." in rest and not (ADAPTER in rest and dims == 2):
        rest = rest.replace(".experts.experts.", ".experts.", 1) + EXPERT_AXIS
    number = int(numbered[1]) if numbered else layer
    return rest if number is None else f"{_LAYERS}{number}.{rest}"


def is_stacked(key: str) -> bool:
    """Whether the key's leading axis is the layer."""
    return key.startswith(_LAYERS) and not _NUMBERED.fullmatch(key)


def is_weight(key: str) -> bool:
    """Whether the key belongs to the model, not to its training."""
    return not key.startswith(_STATE)


def global_shape(output: Output, layers: int, *, stacked: bool = True) -> tuple[int, ...]:
    """Shape of the whole key that a parameter is part of."""
    lead = () if place(output.name, stacked=stacked).layer is None else (layers,)
    return lead + output.spec.shape


def chunks(output: Output, shard: Shard, *, stacked: bool = True) -> Iterator[Chunk]:
    """megatron-core's grid, in row-major order: one chunk per layer, expert and gate or up half.

    Loaders read whole chunks, so a finer grid costs nothing and a coarser one would.
    """
    at = place(output.name, stacked=stacked)
    lead = () if at.layer is None else (at.layer,)
    experts = output.name.endswith(EXPERT_AXIS)
    inner = output.spec.shape[1:] if experts else output.spec.shape
    cut = _cuts(inner, output.spec.dtype, shard)
    for expert in range(output.spec.shape[0]) if experts else (None,):
        front = lead if expert is None else (*lead, expert)
        for start, size in cut:
            offsets = (*front, start, *(0 for _ in inner[1:])) if inner else front
            sizes = (*(1 for _ in front), size, *inner[1:]) if inner else tuple(1 for _ in front)
            yield Chunk(at.key, offsets, sizes)


def _cuts(inner: tuple[int, ...], dtype: str, shard: Shard) -> list[tuple[int, int]]:
    """(start, size) along the first axis below layer and expert."""
    if not inner:
        return [(0, 1)]
    size = inner[0] // 2 if shard is Shard.GATED else inner[0]
    row = math.prod(inner[1:]) * itemsize(dtype)
    size = max(1, min(size, _LARGEST_CHUNK // max(row, 1)))
    return [(start, min(size, inner[0] - start)) for start in range(0, inner[0], size)]


def extra_state_modules(outputs: list[Output]) -> dict[str, Output]:
    """Modules that keep an ``_extra_state`` object with Transformer Engine or with the local spec.

    Those are its linear layers, its norms, and its attention when that has parameters. Loaders
    that have such a module demand the object, and ignore objects of modules they do not have.
    """
    found: dict[str, Output] = {}
    for output in outputs:
        module = output.name.rsplit(".", 1)[0]
        kind = module.rsplit(".", 1)[-1]
        if kind.startswith("linear_") or kind.endswith("layernorm") or kind == "core_attention":
            found.setdefault(module, output)
    return found


def extra_state_objects(
    module: str, output: Output, layers: int, *, stacked: bool
) -> Iterator[str]:
    """Names of a module's objects: ``key/shard_<offsets>_<shape>``, one per layer and expert."""
    experts = output.name.endswith(EXPERT_AXIS)
    at = place(f"{module}._extra_state{EXPERT_AXIS if experts else ''}", stacked=stacked)
    for expert in range(output.spec.shape[0]) if experts else (None,):
        offsets = [n for n in (at.layer, expert) if n is not None] or [0]
        shape = [layers] * (at.layer is not None) + [output.spec.shape[0]] * experts or [1]
        yield f"{at.key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, shape))}"
