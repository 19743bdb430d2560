"""Which layers are on which pipeline stage, and the sentence for a number that does not divide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError

if TYPE_CHECKING:
    from gptoss_convert.layout import Layout, Parameter

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one pipeline stage.

    Attributes:
        pp: the stage.
        number: which of the stage's chunks it is (its place in a virtual pipeline).
        first: its first layer.
        layers: how many it has.
        is_last: whether what comes after the layers is here too.

    """

    pp: int
    number: int
    first: int
    layers: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        """Whether what comes before the layers is here too."""
        return self.pp == self.number == 0

    def has(self, parameter: Parameter) -> bool:
        """Whether a parameter is part of this chunk."""
        if parameter.layer is None:
            return self.is_first if parameter.is_before_layers else self.is_last
        return self.first <= parameter.layer < self.first + self.layers


def chunk_sizes(layout: Layout, layers: int) -> tuple[int, ...]:
    """Layers of every chunk, in the order of the layers.

    Raises:
        UsageError: megatron-core would not spread the layers so.

    """
    ends = [n for n in (layout.first, layout.last) if n is not None]
    if layout.vpp > 1 and layout.pp == 1:
        raise UsageError(f"--vpp {layout.vpp} needs several pipeline stages; leave it out")
    if layout.stages:
        return _given(layout, layers, ends)
    must_divide(f"--vpp {layout.vpp}", layout.vpp, layers, "layers")
    if not ends:
        what = f"--pp {layout.pp}" + (f" with --vpp {layout.vpp}" if layout.vpp > 1 else "")
        must_divide(what, layout.pp * layout.vpp, layers, "layers", layout.vpp)
    elif not _ends_fit(layout, layers, layout.first, layout.last):
        raise UsageError(_misfit(layout, layers, ends))
    middle = layout.pp - len(ends)
    between = [(layers - sum(ends)) // middle] * middle if middle else []
    head, tail = ([] if n is None else [n] for n in (layout.first, layout.last))
    return tuple(size // layout.vpp for size in (*head, *between, *tail)) * layout.vpp


def _given(layout: Layout, layers: int, ends: list[int]) -> tuple[int, ...]:
    """The chunks that the user counted himself."""
    sizes, count = layout.stages, layout.pp * layout.vpp
    if ends:
        raise UsageError(f"--pipeline-layers says it all; leave {FIRST} and {LAST} out")
    if len(sizes) != count or sum(sizes) != layers or min(sizes) < 0:
        raise UsageError(
            f"{'+'.join(map(str, sizes))} layers do not fill {count} pipeline stages with the "
            f"model's {layers}; give {count} numbers with that sum"
        )
    return sizes


def _ends_fit(layout: Layout, layers: int, first: int | None, last: int | None) -> bool:
    """Whether megatron-core takes such a first and last stage; no stage may be empty."""
    ends = [n for n in (first, last) if n is not None]
    middle, rest = layout.pp - len(ends), layers - sum(ends)
    if min(ends) < 1 or any(n % layout.vpp for n in ends) or bool(middle) != bool(rest):
        return False
    return middle == 0 or (middle > 0 and rest > 0 and rest % (middle * layout.vpp) == 0)


def _misfit(layout: Layout, layers: int, ends: list[int]) -> str:
    """What a first and a last stage leave to the others, and what would fit."""
    others, rest = layout.pp - len(ends), layers - sum(ends)
    given = [f"{f} {n}" for f, n in ((FIRST, layout.first), (LAST, layout.last)) if n is not None]
    if rest < 0:
        return f"{' and '.join(given)}: the model has {layers} layers; {_advice(layout, layers)}"
    if min(ends) < 1:
        return f"{' and '.join(given)}: this stage would be empty; {_advice(layout, layers)}"
    if others == 0:
        return (
            f"{' and '.join(given)}: no stage of --pp {layout.pp} is left for the other {rest} of "
            f"{layers} layers; {_advice(layout, layers)}"
        )
    return (
        f"{' and '.join(given)}: {rest} of {layers} layers are left to {others} other stages, "
        f"which does not divide{f' with --vpp {layout.vpp}' if layout.vpp > 1 else ''}; "
        f"{_advice(layout, layers)}"
    )


def _advice(layout: Layout, layers: int) -> str:
    """The nearest first stage that works beside the last one, else the nearest last stage."""
    sizes = range(1, layers + 1)
    if (first := layout.first) is not None:
        fits = [n for n in sizes if _ends_fit(layout, layers, n, layout.last)]
        if fits:
            return f"the nearest that works is {FIRST} {_nearest(fits, first)}"
    if (last := layout.last) is not None:
        fits = [n for n in sizes if _ends_fit(layout, layers, layout.first, n)]
        if fits:
            return f"the nearest that works is {LAST} {_nearest(fits, last)}"
    return "leave them out"


def must_divide(what: str, count: int, whole: int, of: str, per: int = 1) -> None:
    """Raise UsageError, one sentence with the nearest number that works, unless it divides.

    Args:
        what: the option and its value, such as ``--tp 3``.
        count: the value.
        whole: what it has to divide.
        of: what that is a number of.
        per: the option's value counts this many times; it divides ``whole``.

    """
    if count > 0 and whole % count == 0:
        return
    least = 1 if per == 1 else 2  # several chunks on one stage are no pipeline
    fits = [n for n in range(least, whole // per + 1) if whole % (n * per) == 0]
    if not fits:
        raise UsageError(f"{what} does not divide the {whole} {of}; leave {what.split()[-2]} out")
    option = f"{what.split()[0]} " if per > 1 else ""
    nearest = f"the nearest that works is {option}{_nearest(fits, count // per)}"
    raise UsageError(f"{what} does not divide the {whole} {of}; {nearest}")


def _nearest(fits: list[int], to: int) -> int:
    """The smaller of two that are equally near."""
    return min(fits, key=lambda n: (abs(n - to), n))
