"""What a field may hold beyond its Python type, and how a refusal words it.

The config modules beside this one evaluate their annotations at run time: they are the schema that
:mod:`gptoss_plugins.train.reading` holds overrides and YAML against.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Within:
    """A number's range.

    Attributes:
        least: the smallest value that is allowed.
        below: the value that all must stay under.

    """

    least: float
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return self.least <= value < self.below

    def __str__(self) -> str:
        if self.below == math.inf:
            return f"of {self.least:g} or more"
        return f"from {self.least:g} to below {self.below:g}"


@dataclass(frozen=True)
class Form:
    """A value that may also be written shorter.

    Attributes:
        text: how to write it, for messages.
        lengthen: a shorter form -> the full one; anything else as it is.

    """

    text: str
    lengthen: Callable[[Any], Any]


def _whole_blend(value: Any) -> Any:
    """``path`` or ``[path, ...]`` -> ``[[path, ...], null]``."""
    if isinstance(value, str):
        return [[value], None]
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return [value, None]
    return value


Positive = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Keep = Annotated[int, Within(-1)]
Rate = Annotated[float, Within(0.0)]
Fraction = Annotated[float, Within(0.0, 1.0)]
Blend = Annotated[
    tuple[tuple[str, ...], tuple[Rate, ...] | None],
    Form("[[path, ...], [weight, ...] or null]", _whole_blend),
]
