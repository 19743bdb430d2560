"""Values that are NaN or infinite: whether they are meant, and how they are told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gptoss_convert.errors import ConvertError
from gptoss_convert.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gptoss_convert.compare import Difference
    from gptoss_convert.logical import Logical
    from gptoss_convert.types import Codec

_REMEDY = "mend the training or the source that made them"


def spoiled_by_design(of: Logical, codecs: Iterable[Codec]) -> frozenset[str]:
    """Tensors that may hold such values: a codec has codes for them and decodes them, or did at the
    import, which kept the bytes behind them for an export (gptoss_convert/spoiled.py).
    """
    named = {
        i.name for step in of.steps.values() for i in step.inputs if i.codec and i.codec.spoiled
    }
    for codec in codecs if hasattr(of.source, "hints") else ():
        with contextlib.suppress(ConvertError):  # what was kept is damaged, which is told elsewhere
            parts = getattr(of.source.hints(codec.name), "spoiled", ())
            named |= {part.removesuffix(suffix) for part in parts for suffix in codec.suffixes[:1]}
    return frozenset(named)


def not_finite(name: str, found: Difference, is_pair: bool, *, meant: bool) -> Iterator[Finding]:
    """What there is to say of a tensor.

    Args:
        name: of the tensor.
        found: its figures.
        is_pair: whether two checkpoints were compared.
        meant: whether such values travel by design.

    """
    ours, theirs = found.nonfinite
    count = f"{ours or theirs:,} of {found.elements:,} values"
    if ours and theirs and found.clashes:
        told = f"NaN or infinite: {ours:,} values of A and {theirs:,} of B, not alike"
    elif found.clashes:
        one, two = ("A", "B") if ours else ("B", "A")
        told = f"NaN or infinite in {one} and finite in {two}: {count}"
    elif ours:
        told = f"NaN or infinite{', in both alike' if is_pair else ''}: {count}"
    else:
        return
    is_harmless = not found.clashes and (is_pair or meant)
    yield Finding("warning" if is_harmless else "error", name, told, _REMEDY)
