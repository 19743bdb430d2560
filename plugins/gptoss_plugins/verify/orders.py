"""Whether the experts of two checkpoints differ by a known mistake of order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gptoss_convert.types import Pair

DOWN, GATE_UP = "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
# A rearrangement explains a difference if it leaves less than this share of it. Rounding to MXFP4 makes
# a relative error of about 0.11, and a wrong order one of about 1.4, so 0.08 may be left of that.
_MUCH = 0.25
_CORNER = 512  # of a matrix is enough to see whether it is transposed
_COLUMNS = 64  # of it, to see the order of its rows


def experts_in_order(pair: Pair) -> Iterator[Finding]:
    """What differs between two checkpoints' experts is no known mistake of order."""
    if pair.equal or pair.second is None:
        return
    if pair.name.endswith((DOWN, GATE_UP)) and pair.shape[-1] == pair.shape[-2]:
        corners = zip(_orders(pair.first, pair), _orders(pair.second, pair), strict=True)
        if any(_explains(first, second, second.T) for first, second in corners):
            short = pair.name.rsplit(".", 1)[-1]
            yield Finding(
                "error",
                pair.name,
                f"transposed {short}: rows and columns of every expert are swapped",
                "convert the model again; a square matrix does not show its orientation",
            )
            return
    if pair.name.endswith((GATE_UP, GATE_UP + "_bias")):
        both = (_gated_rows(tensor, pair) for tensor in (pair.first, pair.second))
        first, second = (rows[..., :_COLUMNS] if rows.dim() > 1 else rows for rows in both)
        for state, rows in _gate_orders(second):
            if _explains(first, second, rows):
                yield Finding(
                    "error",
                    pair.name,
                    state,
                    "convert the model again with a tool that knows GPT-OSS's order of gate and up",
                )
                return


def _orders(tensor: Tensor, pair: Pair) -> Iterator[Tensor]:
    """A corner of the first expert as ``[out, in]``, in every order in which it may have been turned:
    gates and ups alternate in Hugging Face's, and stand one behind the other in Megatron's.
    """
    if pair.name.endswith(DOWN):
        yield _natural(tensor, pair)[:_CORNER, :_CORNER]
        return
    rows = _gated_rows(tensor, pair)
    halves = rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    for matrix in (rows, halves):
        yield matrix[:_CORNER, :_CORNER]


def _natural(tensor: Tensor, pair: Pair) -> Tensor:
    """The first expert as ``[out, in]``, in whatever order of rows."""
    expert: Tensor = tensor[0]
    if pair.in_hf_order:
        return expert.T
    return expert.flatten(0, 1) if expert.dim() == 3 else expert


def _gated_rows(tensor: Tensor, pair: Pair) -> Tensor:
    """The first expert's rows, or biases, in Hugging Face's order: gate, up, gate, up."""
    expert = tensor[0]
    if pair.in_hf_order:
        return expert if pair.name.endswith("_bias") else expert.T
    rows = expert.flatten() if pair.name.endswith("_bias") else _natural(tensor, pair)
    halves: Tensor = rows.unflatten(0, (2, -1))
    return halves.transpose(0, 1).flatten(0, 1)


def _gate_orders(rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What rows would be if a known mistake were undone."""
    halves = rows.unflatten(0, (2, -1))
    pairs = rows.unflatten(0, (-1, 2))
    yield (
        "gate and up not de-interleaved: halves were taken of rows in which they alternate",
        pairs.transpose(0, 1).flatten(0, 1),
    )
    yield (
        "gate and up de-interleaved once too often: all gates stand first where they should alternate",
        halves.transpose(0, 1).flatten(0, 1),
    )
    yield "gate and up swapped: each stands where the other belongs", pairs.flip(1).flatten(0, 1)


def _explains(first: Tensor, second: Tensor, mended: Tensor) -> bool:
    """Whether a tensor that was mended is much nearer to the first than as it is."""
    before = (second.double() - first.double()).square().sum()
    after = (mended.double() - first.double()).square().sum()
    return bool(after <= _MUCH**2 * before)
