"""MXFP4 in plain torch, by table: the path that is always there.

Decoding looks up each (scale, byte) pair's two values. Encoding works on the integer bits of the
values: with the scale's exponent taken off them, the nearest code is a matter of thresholds.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import reference
from gptoss_kernels.mxfp4.form import (
    BLOCK,
    BYTES,
    LARGEST_SCALE,
    NAN_SCALE,
    SHIFTED,
    Rule,
)
from gptoss_kernels.mxfp4.threads import contiguous, scratch, spread
from gptoss_kernels.mxfp4.views import chunks

_DECODE_CHUNK = 16384  # blocks at a time; index and result stay in the cache, and threads
_ENCODE_CHUNK = 8192  # do not wait for each other at every step
_SMALL = 2  # up to this scale byte, elements may be subnormal: their bits are no scaled exponent


def decode(blocks: Tensor, scales: Tensor, view: Tensor) -> None:
    """``view[e, a, b, :]`` from row ``a * B + b`` of expert ``e``; exact."""
    both = pairs(view.device)

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        count = rows.numel() // BLOCK
        index = scratch(0, (count, BYTES), torch.int32, view.device).copy_(
            blocks[part].view(-1, BYTES)
        )
        high = scratch(1, (count, 1), torch.int32, view.device).copy_(scales[part].view(-1, 1))
        index |= high.bitwise_left_shift_(8)
        in_place = rows.is_contiguous() and rows.storage_offset() % 2 == 0  # two values at a time
        values = rows if in_place else scratch(2, rows.shape, rows.dtype, view.device)
        torch.index_select(both, 0, index.view(-1), out=values.view(-1).view(torch.int32))
        if not in_place:
            rows.copy_(values)

    spread(work, list(chunks(view, _DECODE_CHUNK)))


@cache
def pairs(device: torch.device) -> Tensor:
    """int32 ``[65536]``: entry ``scale << 8 | byte`` holds the two bfloat16 values of the byte."""
    byte = torch.arange(256, dtype=torch.uint8)
    blocks = byte.view(1, BYTES, 1, BYTES).expand(256, -1, -1, -1)
    scales = byte.view(256, 1, 1).expand(-1, BYTES, 1)
    values = torch.empty(256, BYTES, 1, BLOCK, dtype=torch.bfloat16)
    reference.decode(blocks.contiguous(), scales.contiguous(), values)
    return values.view(torch.int32).view(-1).to(device)


def encode(view: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """Blocks and scales of ``view``; scale 255 and codes 0 where a block holds NaN or infinity."""

    def work(chunk: tuple[tuple[int, slice], Tensor]) -> None:
        part, rows = chunk
        wanted = None if hint is None else hint[part].view(-1)
        made = blocks[part].view(-1, BYTES), scales[part].view(-1)
        _encode(contiguous(rows).view(-1, BLOCK), rule, wanted, *made)

    spread(work, list(chunks(view, _ENCODE_CHUNK)))


def _encode(x: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor) -> None:
    """One chunk, ``[N, 32]``."""
    bits, fraction = (x.view(torch.int32), 23) if x.itemsize == 4 else (x.view(torch.int16), 7)
    spare = scratch(0, bits.shape, bits.dtype, bits.device)
    magnitude = torch.bitwise_and(bits, (1 << (8 + fraction)) - 1, out=spare)
    amax = magnitude.amax(1)
    scale = _scale(amax, rule, fraction)
    codes = _codes(magnitude, scale.clamp_min(_SMALL + 1), fraction)
    codes |= torch.bitwise_right_shift(bits, 5 + fraction, out=spare).bitwise_and_(8)
    _pack(codes, blocks)
    scales.copy_(scale)
    if hint is not None:
        torch.where((amax == 0) & (hint != NAN_SCALE), hint, scales, out=scales)
        _keep_hints(x, codes, hint, blocks, scales, (amax > 0) & (scale > _SMALL))
    _redo((amax > 0) & (scale <= _SMALL), x, rule, hint, blocks, scales)
    broken = amax >= 255 << fraction
    if bool(broken.any()):
        blocks[broken] = 0
        scales[broken] = NAN_SCALE


def _scale(amax: Tensor, rule: Rule, fraction: int) -> Tensor:
    """The rule of ``form.py``, from the bits of the largest magnitude: int32."""
    return (((amax.int() + carry(rule, fraction)) >> fraction) - 2).clamp_(0, LARGEST_SCALE)


def carry(rule: Rule, fraction: int) -> int:
    """What to add to a magnitude's bits so that its exponent goes up where the rule says so."""
    quarter = 1 << (fraction - 2)
    return {"even": quarter, "floor": 0, "round_up": 2 * quarter - 1}[rule]


def _codes(magnitude: Tensor, scale: Tensor, fraction: int) -> Tensor:
    """Nearest E2M1 codes, ties to even, from the bits of normal numbers.

    ``t`` counts from 0.25 at the block's scale, ``1 << fraction`` to each doubling. From 1.0 on
    (code 2) codes are half a doubling apart, so rounding ``t`` to that is rounding to nearest;
    below there are only the thresholds 0.25 and 0.75. ``magnitude`` is used up.
    """
    base = ((scale - 2) << fraction).to(magnitude.dtype)
    like = (magnitude.shape, magnitude.dtype, magnitude.device)
    t = torch.sub(magnitude, base[:, None], out=scratch(1, *like))
    step = fraction - 1
    codes = torch.bitwise_right_shift(t, step, out=scratch(2, *like)).bitwise_and_(1)
    codes += t
    codes += (1 << (step - 1)) - 1
    codes >>= step
    codes.clamp_(max=9).sub_(2)
    small = torch.sub(t, (3 << step) - 1, out=magnitude).clamp_(0, 1)
    small += t.clamp_(0, 1)
    return torch.maximum(codes, small, out=codes)


def _pack(codes: Tensor, blocks: Tensor) -> None:
    """Codes ``[N, 32]`` -> bytes ``[N, 16]``; the two of a byte are neighbours in memory."""
    pairs = codes.view(torch.int32) if codes.itemsize == 2 else codes.view(torch.int64)
    high = scratch(0, pairs.shape, pairs.dtype, pairs.device)
    torch.bitwise_right_shift(pairs, 8 * codes.itemsize - 4, out=high)
    blocks.copy_(high.bitwise_or_(pairs))


def _keep_hints(
    x: Tensor, codes: Tensor, hint: Tensor, blocks: Tensor, scales: Tensor, where: Tensor
) -> None:
    """Write blocks at the hint instead where that decodes to exactly the same values."""
    above = hint.short() - scales
    (found,) = torch.where(where & (above > 0) & (above < len(SHIFTED)) & (hint != NAN_SCALE))
    if not len(found):
        return
    few = codes[found]
    shifted = _shifted(x.device)[above[found].long()[:, None], (few & 7).long()]
    packed = torch.empty(len(found), BYTES, dtype=torch.uint8, device=x.device)
    _pack(shifted.to(codes.dtype) | (few & 8), packed)
    back = torch.empty(1, len(found), 1, BLOCK, dtype=torch.bfloat16, device=x.device)
    decode(packed[None, :, None], hint[found][None, :, None], back)
    exact = (back.view(-1, BLOCK).to(x.dtype) == x[found]).all(1)
    blocks[found[exact]] = packed[exact]
    scales[found[exact]] = hint[found[exact]]


@cache
def _shifted(device: torch.device) -> Tensor:
    """uint8 ``[4, 8]``; where a quotient is off the grid any code will do, as it decodes to another."""
    return torch.tensor([[code or 0 for code in row] for row in SHIFTED], device=device)


def _redo(
    where: Tensor, x: Tensor, rule: Rule, hint: Tensor | None, blocks: Tensor, scales: Tensor
) -> None:
    """Encode some blocks again by the reference."""
    (found,) = torch.where(where)
    if not len(found):
        return
    made = torch.empty_like(blocks[found]), torch.empty_like(scales[found])
    wanted = None if hint is None else hint[found][None, :, None]
    rows = x[found][None, :, None]
    reference.encode(rows, rule, wanted, made[0][None, :, None], made[1][None, :, None])
    blocks[found], scales[found] = made
