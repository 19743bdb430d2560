"""What encoding to MXFP4 lost: decoded again and compared, chunk by chunk, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import table
from gptoss_kernels.mxfp4.form import BLOCK, BYTES
from gptoss_kernels.mxfp4.views import chunks, four_dims

_CHUNK = 8192  # blocks at a time, so that intermediate results stay in the cache


class MXFP4Loss(NamedTuple):
    """Counts and sums; errors of elements that are not finite on both sides are left out.

    Attributes:
        blocks: blocks of 32.
        kept: blocks that decode to exactly what they were made from, signs of zeros included.
        largest: the largest absolute error.
        squares: sum of the squared errors.
        power: sum of the squared values.
        elements: 32 times the blocks.

    """

    blocks: int
    kept: int
    largest: float
    squares: float
    power: float
    elements: int


def loss(tensor: Tensor, blocks: Tensor, scales: Tensor) -> MXFP4Loss:
    """Compare ``tensor`` (bfloat16, float16 or float32 ``[..., K]`` on the CPU) with what its
    blocks and scales, in the same order, decode to. Sums are in float64. Decoding is always by
    table, so what another backend made is checked by an independent one.
    """
    view = four_dims(tensor)
    places = (view.shape[0], view.shape[1] * view.shape[2], view.shape[3] // BLOCK)
    blocks, scales = blocks.view(*places, BYTES), scales.view(places)
    kept, largest, squares, power = 0, 0.0, 0.0, 0.0
    for part, rows in chunks(view, _CHUNK):
        back = torch.empty(rows.shape, dtype=torch.bfloat16)
        table.decode(blocks[part][None], scales[part][None], back.view(1, -1, 1, view.shape[3]))
        value, again = rows.reshape(-1, BLOCK).float(), back.view(-1, BLOCK).float()
        same = (value.view(torch.int32) == again.view(torch.int32)).all(1)
        kept += int(same.sum())
        finite = value.nan_to_num(0.0, 0.0, 0.0)
        power += float(torch.linalg.vector_norm(finite, dtype=torch.float64)) ** 2
        if not bool(same.all()):
            error = (again - value).nan_to_num_(0.0, 0.0, 0.0)
            largest = max(largest, float(error.abs().max()))
            squares += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
    count = scales.numel()
    return MXFP4Loss(count, kept, largest, squares, power, count * BLOCK)
