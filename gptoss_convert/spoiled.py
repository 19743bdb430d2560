"""Telling of values that a source's codec decodes to infinity or NaN."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gptoss_convert.fit import Input

log = logging.getLogger("gptoss_convert")


class Spoiled:
    """Counts them, from any thread; what is read twice, as for two ranks' files, counts once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], tuple[int, int]] = {}

    def look(self, of: Input, parts: Sequence[Tensor], start: int, stop: int) -> None:
        """At units ``[start, stop)`` of an input, as they are stored."""
        look = of.codec and of.codec.spoiled
        if not look or not any(look(parts)):
            return
        for unit in range(start, stop):
            each = [len(part) // (stop - start) for part in parts]
            place = unit - start
            rows = [p[place * n : (place + 1) * n] for p, n in zip(parts, each, strict=True)]
            self._found[of.name, unit] = look(rows)

    def tell(self) -> None:
        """A line per tensor."""
        totals: dict[str, tuple[int, int]] = {}
        for (name, _), (infinite, nan) in self._found.items():
            before = totals.get(name, (0, 0))
            totals[name] = before[0] + infinite, before[1] + nan
        for name, counts in sorted(totals.items()):
            found = zip(counts, ("infinite", "NaN"), strict=True)
            what = ", ".join(f"{count:,} {kind}" for count, kind in found if count)
            log.warning(
                "%s: decodes to values that are not finite (%s); check the source if it should not",
                name,
                what,
            )
