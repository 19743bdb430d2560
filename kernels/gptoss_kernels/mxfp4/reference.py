"""MXFP4 as the definition has it, in float64 and plain torch: slow, and what the others must match."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels.mxfp4.form import (
    BIAS,
    BLOCK,
    LARGEST_SCALE,
    MAGNITUDES,
    MIDPOINTS,
    NAN_BITS,
    NAN_SCALE,
    Rule,
)
from gptoss_kernels.mxfp4.views import chunks

_CHUNK = 1 << 16  # blocks at a time; float64 takes four times the memory


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``."""
    for part, rows in chunks(view, _CHUNK):
        codes = _unpack(blocks[part].reshape(-1, BLOCK // 2))
        factor = scales[part].reshape(-1, 1)
        values = _signed(_table(codes.device)[codes & 7], codes >> 3) * _power(factor)
        made = values.to(torch.bfloat16)
        made[scales[part].reshape(-1) == NAN_SCALE] = _nan(view.device)
        rows.copy_(made.view(rows.shape))


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""
    for part, rows in chunks(view, _CHUNK):
        x = rows.reshape(-1, BLOCK).double()
        factor = _scale(x.abs().amax(1), rule)
        if hint is not None:
            wanted = hint[part].reshape(-1)
            factor = torch.where(_on_grid(x, wanted), wanted.long(), factor)
        codes = _nearest(x.abs() / _power(factor[:, None])) | (torch.signbit(x).long() << 3)
        broken = ~x.isfinite().all(1)
        factor[broken] = NAN_SCALE
        codes[broken] = 0
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        blocks[part].copy_(packed.to(torch.uint8).view(blocks[part].shape))
        scales[part].copy_(factor.to(torch.uint8).view(scales[part].shape))


def _scale(amax: Tensor, rule: Rule) -> Tensor:
    """The rule of ``form.py``; int64."""
    fraction, exponent = torch.frexp(amax)  # amax == fraction * 2**exponent, 1/2 <= fraction < 1
    m, n = 2 * fraction, exponent.long() - 1
    up = {"even": m >= 1.75, "floor": m < 0, "round_up": m > 1.5}[rule]
    return torch.where(amax > 0, n - 2 + BIAS + up.long(), 0).clamp(0, LARGEST_SCALE)


def _on_grid(x: Tensor, scale: Tensor) -> Tensor:
    """Which blocks are exactly representable at their scale."""
    power = _power(scale[:, None])
    back = _table(x.device)[_nearest(x.abs() / power)] * power
    return (back == x.abs()).all(1) & (scale != NAN_SCALE)


def _nearest(magnitude: Tensor) -> Tensor:
    """The code of the nearest E2M1 magnitude, ties to the even code."""
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float64, device=magnitude.device)
    below = torch.searchsorted(midpoints, magnitude.contiguous())  # a tie counts as below
    tie = (magnitude[..., None] == midpoints).any(-1)
    return below + (tie & (below % 2 == 1)).long()


def _power(scale: Tensor) -> Tensor:
    """2**(scale - 127) from its bits: ``torch.pow`` is not exact on every device."""
    return ((scale.long() - BIAS + 1023) << 52).view(torch.float64)


def _signed(magnitude: Tensor, negative: Tensor) -> Tensor:
    return torch.where(negative.bool(), -magnitude, magnitude)


def _nan(device: torch.device) -> Tensor:
    """Its bits spelled out: what torch makes of a float64 NaN differs from place to place."""
    return torch.tensor(NAN_BITS, dtype=torch.int16, device=device).view(torch.bfloat16)


def _table(device: torch.device) -> Tensor:
    return torch.tensor(MAGNITUDES, dtype=torch.float64, device=device)


def _unpack(packed: Tensor) -> Tensor:
    """uint8 [N, 16] -> int64 [N, 32]."""
    wide = packed.long()
    return torch.stack([wide & 15, wide >> 4], dim=-1).flatten(1)
