"""MXFP4 to bfloat16, exact.

OCP Microscaling Formats (MX) v1.0: a block is 32 E2M1 codes in 16 bytes (element 2j is the low
nibble of byte j) that share one E8M0 scale byte ``s``; the value is ``e2m1 * 2**(s - 127)``, and
``s == 255`` is NaN. Every product is a bfloat16 (two significant bits, smallest magnitude 2**-128,
a bfloat16 subnormal), except that those past bfloat16's largest (s = 253 with codes 6 and 7,
s = 254 with codes 4 to 7) become infinite.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK = 32  # values per scale
BYTES = 16  # packed bytes per block
_NAN_SCALE = 255
_CHUNK = 8192  # blocks decoded at a time; index and result stay in the cache


def decode(blocks: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Decode MXFP4 to bfloat16.

    Args:
        blocks: uint8 ``[..., N, 16]``, packed codes.
        scales: uint8 ``[..., N]``, one per block.
        out: optional contiguous bfloat16 memory for the result, of its number of elements.

    Returns:
        bfloat16 ``[..., N * 32]``, in ``out`` if given.

    """
    if out is None:
        out = torch.empty(scales.numel() * BLOCK, dtype=torch.bfloat16)
    codes, factors = blocks.reshape(-1, BYTES), scales.reshape(-1, 1)
    pairs = out.view(torch.int32).view(-1, BYTES)
    low = torch.empty((min(_CHUNK, len(codes)), BYTES), dtype=torch.int32)
    high = torch.empty((len(low), 1), dtype=torch.int32)
    for start in range(0, len(codes), _CHUNK):
        stop = min(start + _CHUNK, len(codes))
        index = low[: stop - start].copy_(codes[start:stop])
        index |= high[: stop - start].copy_(factors[start:stop]).bitwise_left_shift_(8)
        torch.index_select(_pairs(), 0, index.view(-1), out=pairs[start:stop].view(-1))
    return out.view(*scales.shape[:-1], -1)


@cache
def _pairs() -> Tensor:
    """int32 ``[65536]``: entry ``scale << 8 | byte`` holds the two bfloat16 values of the byte."""
    exponents = torch.arange(256, dtype=torch.float64) - 127
    values = torch.tensor(E2M1, dtype=torch.float64) * torch.exp2(exponents)[:, None]
    values[_NAN_SCALE] = torch.nan
    table = values.to(torch.bfloat16)  # [256, 16]
    byte = torch.arange(256)
    pairs = torch.stack([table[:, byte & 15], table[:, byte >> 4]], dim=-1)  # [256, 256, 2]
    return pairs.contiguous().view(torch.int32).view(-1)
