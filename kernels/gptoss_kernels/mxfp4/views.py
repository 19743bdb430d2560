"""Layouts as views: every backend reads and writes bfloat16 through ``[E, A, B, K]`` of any strides.

Row ``a * B + b`` of the view is row ``a * B + b`` of the blocks, so a change of layout (rows
de-interleaved, matrix transposed) is only another set of strides, and costs no pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_kernels.mxfp4.form import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def stored_order(tensor: Tensor, *, transpose: bool, interleave: bool) -> Tensor:
    """A tensor in the model's layout, seen in the order in which its blocks are stored.

    Args:
        tensor: ``[..., R, K]``; ``[..., K, R]`` if ``transpose``.
        transpose: whether K, the axis along which blocks run, is the last but one.
        interleave: whether the R rows are ``[gate; up]`` where the blocks alternate them.

    Returns:
        a view ``[..., R, K]``, or ``[..., R/2, 2, K]`` if interleaved.

    """
    rows = tensor.transpose(-1, -2) if transpose else tensor
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2) if interleave else rows


def four_dims(view: Tensor) -> Tensor:
    """``[..., K]`` -> ``[E, A, B, K]``, without copying where the strides allow it."""
    if view.is_contiguous():
        return view.reshape(1, -1, 1, view.shape[-1])
    if view.dim() > 4:
        return view.flatten(0, -4)
    while view.dim() < 3:
        view = view[None]
    return view.unsqueeze(-2) if view.dim() == 3 else view


def chunks(view: Tensor, most: int) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Runs of rows with about ``most`` blocks each.

    Yields:
        the place of the rows in blocks and scales ``[E, R, ...]``, and the rows ``[a, B, K]``.

    """
    experts, outer, inner, width = view.shape
    step = most * BLOCK // (inner * width)
    for expert in range(experts):
        for start in range(0, outer, max(1, step)):
            if step == 0:
                yield from _parts(view, expert, start, max(1, most * BLOCK // width))
                continue
            stop = min(start + step, outer)
            yield (expert, slice(start * inner, stop * inner)), view[expert, start:stop]


def _parts(
    view: Tensor, expert: int, outer: int, step: int
) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """The same of one ``A``, whose ``B`` rows are too many for one run."""
    inner = view.shape[2]
    first = outer * inner
    for start in range(0, inner, step):
        stop = min(start + step, inner)
        rows = view[expert, outer : outer + 1, start:stop]
        yield (expert, slice(first + start, first + stop)), rows
