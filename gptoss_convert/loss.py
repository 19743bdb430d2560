"""What quantization costs: counted and summed piece by piece, told tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import write_note

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.types import Codec


@dataclass(frozen=True)
class Loss:
    """The difference between a tensor and what its encoded form decodes to.

    Differences are those of finite values. One that is NaN or infinite afterwards, as every value of
    a block that was made NaN, differs by all of its size.

    Attributes:
        blocks: how many blocks there are, or other units.
        kept: those that decode to exactly what they were made from.
        largest: the largest absolute difference.
        squares: sum of the squared differences.
        power: sum of the squared values.
        elements: how many there are.
        nonfinite: those that were NaN or infinite.
        unit: what ``blocks`` and ``kept`` count; elements, for a codec that has no ``measure``.

    """

    blocks: int = 0
    kept: int = 0
    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0
    elements: int = 0
    nonfinite: int = 0
    unit: str = "blocks"

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.blocks + other.blocks,
            self.kept + other.kept,
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.power + other.power,
            self.elements + other.elements,
            self.nonfinite + other.nonfinite,
            self.unit if self.blocks else other.unit,
        )

    @property
    def rms(self) -> float:
        """Root of the mean squared difference of the finite values."""
        finite = self.elements - self.nonfinite
        return math.sqrt(self.squares / finite) if finite else 0.0

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise in dB, ``10 log10(power / squares)``; None without noise."""
        if self.squares == 0:
            return None
        return 10 * math.log10(self.power / self.squares) if self.power else -math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        return {
            "unit": self.unit,
            "blocks": self.blocks,
            "kept": self.kept,
            "requantized": self.blocks - self.kept,
            "nonfinite": self.nonfinite,
            "max_error": self.largest,
            "rms_error": self.rms,
            "sqnr_db": self.sqnr,
        }


def measure(codec: Codec, tensor: Tensor, parts: Sequence[Tensor]) -> Loss:
    """The loss of one piece."""
    if codec.measure is not None:
        return codec.measure(tensor, parts)
    decoded = codec.decode(parts).reshape(tensor.shape)
    total = Loss()
    for row, back in zip(
        tensor, decoded, strict=True
    ):  # one at a time: float64 is four times as large
        value, again = row.double(), back.double()
        finite = value.isfinite()
        value, again = value[finite], again[finite]
        error = again.where(again.isfinite(), 0) - value
        total += Loss(
            row.numel(),
            int((again == value).sum()),
            float(error.abs().max()) if len(error) else 0.0,
            float(error.square().sum()),
            float(value.square().sum()),
            row.numel(),
            row.numel() - len(value),
            "elements",
        )
    return total


def total(losses: Iterable[Loss]) -> Loss:
    """All of them together."""
    return sum(losses, Loss())


def save(path: Path, losses: Mapping[str, Loss]) -> None:
    """Put the losses of a group beside it, for a run that goes on from here."""
    text = json.dumps({name: dataclasses.astuple(loss) for name, loss in losses.items()})
    write_note(path, text.encode())


def load(path: Path) -> dict[str, Loss]:
    """What :func:`save` wrote."""
    return {name: Loss(*values) for name, values in json.loads(path.read_bytes()).items()}
