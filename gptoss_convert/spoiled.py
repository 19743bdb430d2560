"""What a source's codec decodes to infinity or NaN: told to the user, and kept for an export.

Such values can't be encoded again, so the stored bytes behind them have to travel as they are.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from gptoss_convert.blockio import write_note

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.fit import Input

log = logging.getLogger("gptoss_convert")
MOST = 1 << 22  # rows of bytes that are kept, in all: about 100 MB of them


class Residue(NamedTuple):
    """Rows (along the last dim) of a stored part: their bytes, and where they belong.

    Attributes:
        at: int64 ``[n]``, ascending, an index into all dims but the last, flattened.
        rows: ``[n, last dim]``.

    """

    at: Tensor
    rows: Tensor


class _Found(NamedTuple):
    infinite: int
    nan: int
    part: str  # the stored name that the residue is of
    residue: Residue


class Spoiled:
    """Collects them, from any thread; what is read twice, as for two ranks' files, counts once.

    Args:
        keep: whether the bytes are wanted.

    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._found: dict[tuple[str, int], _Found] = {}  # by logical name and unit
        self._kept, self._locked = 0, threading.Lock()

    def look(self, of: Input, parts: Sequence[Tensor], start: int, stop: int) -> None:
        """At units ``[start, stop)`` of an input, as they are stored."""
        look = of.codec and of.codec.spoiled
        if not look or look(parts) is None:
            return
        each = [len(part) // (stop - start) for part in parts]
        for place in range(stop - start):
            unit = [p[place * n : (place + 1) * n] for p, n in zip(parts, each, strict=True)]
            if (spoiled := look(unit)) is None:
                continue
            at = spoiled.where.reshape(-1).nonzero()[:, 0]
            rows = unit[0].reshape(-1, unit[0].shape[-1])[at]
            residue = Residue(at + (start + place) * spoiled.where.numel(), rows)
            found = _Found(spoiled.infinite, spoiled.nan, of.parts[0][0], residue)
            self._add({(of.name, start + place): found})

    def _add(self, found: Mapping[tuple[str, int], _Found]) -> None:
        with self._locked:
            for key, one in found.items():
                if key in self._found:
                    continue
                count = len(one.residue.at)
                if not self._keep or self._kept > MOST:  # count on, so that all processes agree
                    one = one._replace(residue=Residue(*(t[:0] for t in one.residue)))
                self._kept += count
                self._found[key] = one

    def save(self, path: Path) -> None:
        """Put what was found aside, if anything was, for a run that goes on from here."""
        if not self._found:
            return
        import torch
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for (name, unit), found in self._found.items():
            key = f"{name}|{unit}|{found.part}"
            counts = torch.tensor([found.infinite, found.nan])
            tensors |= {f"{key}|counts": counts, f"{key}|at": found.residue.at}
            tensors[f"{key}|rows"] = found.residue.rows.contiguous()
        write_note(path, save(tensors))

    def load(self, path: Path) -> None:
        """Take up what :meth:`save` wrote, if it wrote anything."""
        if not path.exists():
            return
        from safetensors.torch import load

        tensors = load(path.read_bytes())
        for key in (k.removesuffix("|counts") for k in tensors if k.endswith("|counts")):
            name, unit, part = key.split("|")
            infinite, nan = map(int, tensors[f"{key}|counts"])
            residue = Residue(tensors[f"{key}|at"].clone(), tensors[f"{key}|rows"].clone())
            self._add({(name, int(unit)): _Found(infinite, nan, part, residue)})

    def merge(self, other: Spoiled) -> None:
        """Take over what another one found."""
        self._add(other._found)

    def residues(self) -> dict[str, Residue]:
        """By stored name, what is to be kept; nothing if it is too much."""
        import torch

        if not self._keep or not self._found:
            return {}
        if self._kept > MOST:
            log.warning(
                "too much of the source decodes to values that are not finite (%s blocks) to be "
                "kept beside the checkpoint; an export cannot give those bytes back",
                f"{self._kept:,}",
            )
            return {}
        whole: dict[str, list[Residue]] = {}
        for _, found in sorted(self._found.items(), key=lambda item: item[0]):
            whole.setdefault(found.part, []).append(found.residue)
        return {
            name: Residue(*(torch.cat(tensors) for tensors in zip(*several, strict=True)))
            for name, several in whole.items()
        }

    def tell(self) -> None:
        """A line per tensor."""
        totals: dict[str, tuple[int, int]] = {}
        for (name, _), found in self._found.items():
            before = totals.get(name, (0, 0))
            totals[name] = before[0] + found.infinite, before[1] + found.nan
        for name, counts in sorted(totals.items()):
            pairs = zip(counts, ("infinite", "NaN"), strict=True)
            what = ", ".join(f"{count:,} {kind}" for count, kind in pairs if count)
            log.warning(
                "%s: decodes to values that are not finite (%s); check the source if it should not",
                name,
                what,
            )
