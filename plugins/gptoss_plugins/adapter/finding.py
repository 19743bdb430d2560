"""What an adapter adapts: shared by both formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from gptoss_convert.types import TensorSource
    from gptoss_plugins.adapter.table import Target


class Found(NamedTuple):
    """What an adapter is.

    Attributes:
        source: of its tensors.
        targets: what it adapts, in the table's order.
        rank, alpha: their quotient is its scale.
        base: how the model is called that it was made for; "" if nothing says.

    """

    source: TensorSource
    targets: tuple[Target, ...]
    rank: int
    alpha: float
    base: str


def halves(names: Collection[str], one: str, other: str) -> Iterator[str]:
    """Problems: factors without their counterpart, whose name differs in ``one`` and ``other``."""
    for name in names:
        for mine, its in ((one, other), (other, one)):
            if mine in name and (missing := name.replace(mine, its)) not in names:
                yield f"{missing}: is missing, so {name} is half an adapter; save it again"


def strange(name: str, known: Iterable[str]) -> str:
    """The problem: a factor of what is none of the ``known``."""
    names = ", ".join(one.replace("{L}", "N") for one in known)
    return f"{name}: adapts what cannot be carried over; that can be {names}"
