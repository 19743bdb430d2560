"""The number closest to one that does not work. Of two that are as close, the larger."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def multiple(value: int, of: int) -> int:
    """The nearest multiple that is not 0."""
    return max(of, (value + of // 2) // of * of)


def divisor(value: int, *of: int) -> int:
    """The nearest number that divides all of these."""
    whole = math.gcd(*of)
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return closest(value, [*small, *(whole // d for d in small)])


def closest(value: int, others: Iterable[int]) -> int:
    """The nearest of some numbers."""
    return min(others, key=lambda other: (abs(other - value), -other))
