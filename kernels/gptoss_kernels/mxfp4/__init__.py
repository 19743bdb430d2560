"""MXFP4, both ways: exact decoding, and encoding that gives a source's own bytes back.

>>> import torch
>>> from gptoss_kernels import mxfp4
>>> blocks, scales = mxfp4.encode(torch.tensor([[1.0, -0.5] * 16]))
>>> mxfp4.decode(blocks, scales)[0, :2].tolist()
[1.0, -0.5]

``form.py`` has the format and its rules, ``backends.py`` what runs where.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gptoss_kernels.mxfp4.backends import BACKENDS, Backend, choose, chosen
from gptoss_kernels.mxfp4.form import (
    BLOCK,
    BYTES,
    LARGEST,
    LARGEST_SCALE,
    NAN_SCALE,
    RULES,
    Rule,
)
from gptoss_kernels.mxfp4.views import four_dims, stored_order

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BACKENDS",
    "BLOCK",
    "BYTES",
    "RULES",
    "Backend",
    "Encoded",
    "NonFiniteError",
    "OnNonFinite",
    "Rule",
    "choose",
    "chosen",
    "decode",
    "encode",
    "spoiled",
]
OnNonFinite = Literal["error", "nan", "saturate"]


class Encoded(NamedTuple):
    """uint8 blocks ``[..., R, K/32, 16]`` and scales ``[..., R, K/32]``."""

    blocks: Tensor
    scales: Tensor


class NonFiniteError(ValueError):
    """A value to encode is NaN or infinite, which MXFP4 cannot hold.

    Attributes:
        block: the first such block, as an index into the scales.
        count: how many blocks hold one.
        holds: what the first one holds: NaN, infinity, or both; in words.
        any_nan: whether any of them holds NaN, which cannot be saturated.

    """

    def __init__(self, block: tuple[int, ...], count: int, holds: str, any_nan: bool) -> None:
        self.block, self.count, self.holds, self.any_nan = block, count, holds, any_nan
        super().__init__(f"block {list(block)} holds {holds} ({count} such blocks in all)")


def decode(
    blocks: Tensor,
    scales: Tensor,
    out: Tensor | None = None,
    *,
    transpose: bool = False,
    deinterleave: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decode MXFP4 to bfloat16, exactly, in the layout that is wanted. Experts can be decoded by
    range: slice both inputs.

    Args:
        blocks: uint8 ``[..., R, K/32, 16]``, packed codes.
        scales: uint8 ``[..., R, K/32]``, one per block.
        out: contiguous bfloat16 memory for the result, of its number of elements.
        transpose: make ``[..., K, R]``, which is Hugging Face's BF16 layout.
        deinterleave: R alternates gate and up; put all gates before all ups, as Megatron has it.
        backend: one of ``BACKENDS``; None or ``auto`` takes the best for the device.

    Returns:
        bfloat16 ``[..., R, K]`` (or ``[..., K, R]``), in ``out`` if given. The extra memory is
        that of a chunk.

    Raises:
        ValueError: the shapes do not belong together, or the backend does not run here.

    """
    _require_bytes(blocks, scales)
    *lead, rows, groups = (1,) * (2 - scales.dim()) + tuple(scales.shape)
    if deinterleave and rows % 2:
        raise ValueError(f"gate and up alternate along an odd number of rows, {rows}")
    width = groups * BLOCK
    shape = (*lead, width, rows) if transpose else (*lead, rows, width)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=blocks.device)
    if (
        out.dtype != torch.bfloat16
        or not out.is_contiguous()
        or out.numel() != scales.numel() * BLOCK
    ):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, and must be contiguous bfloat16 with "
            f"{scales.numel() * BLOCK} elements"
        )
    made = out.view(shape)
    if out.numel():
        rows_of = stored_order(made, transpose=transpose, interleave=deinterleave)
        view = four_dims(rows_of)
        places = (view.shape[0], view.shape[1] * view.shape[2], groups)
        choose(blocks.device, backend).decode(
            blocks.contiguous().view(*places, BYTES), scales.contiguous().view(places), view
        )
    return made.view(-1) if scales.dim() == 1 else made


def encode(
    tensor: Tensor,
    *,
    rule: Rule = "even",
    hint: Tensor | None = None,
    on_nonfinite: OnNonFinite = "error",
    transpose: bool = False,
    interleave: bool = False,
    out: Encoded | None = None,
    backend: str | None = None,
    originals: Callable[[], Tensor | None] | None = None,
) -> Encoded:
    """Encode bfloat16 or float32 as MXFP4: nearest code, ties to even, signs of zeros kept.

    What MXFP4 can hold comes back exactly, by every rule. With the scales it once had as ``hint``
    its bytes come back too; a wrong hint changes no value. Nothing finite decodes to infinity: past
    1.5 * 2**127, the largest MXFP4 value that bfloat16 holds, it becomes that.

    Args:
        tensor: ``[..., R, K]``, of any strides. float16 is taken as float32.
        rule: how a block's scale follows from its largest magnitude (``form.py``).
        hint: uint8 ``[..., R, K/32]``; a block takes its scale from here if all of its values
            are exactly representable at it.
        on_nonfinite: what becomes of a block with NaN or infinity. ``error`` raises; ``nan``
            makes the whole block NaN; ``saturate`` takes infinity as 1.5 * 2**127, and raises
            for NaN.
        transpose: the tensor is ``[..., K, R]``.
        interleave: its R rows are ``[gate; up]``; they are stored alternating.
        out: where to write.
        backend: one of ``BACKENDS``; None or ``auto`` takes the best for the device.
        originals: called where a block holds NaN or infinity, for blocks ``[..., R, K/32, 16]`` as
            they once were beside ``hint``; those that decode to what is here are put back. None if
            there are none.

    Raises:
        NonFiniteError: see ``on_nonfinite``.
        ValueError: K is no multiple of 32, shapes do not belong together, or the backend does
            not run here.

    """
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"MXFP4 is made from bfloat16 or float32, not {tensor.dtype}")
    if rule not in RULES:
        raise ValueError(f"there is no scale rule {rule!r}; choose {', '.join(RULES)}")
    if on_nonfinite not in get_args(OnNonFinite):
        raise ValueError(
            f"there is no way {on_nonfinite!r} to treat NaN and infinity; choose "
            f"{', '.join(get_args(OnNonFinite))}"
        )
    if tensor.dim() < (2 if transpose or interleave else 1):
        raise ValueError(f"a tensor {list(tensor.shape)} has no rows to transpose or interleave")
    if interleave and tensor.shape[-1 if transpose else -2] % 2:
        raise ValueError("gate and up are halves of the rows, whose number is odd")
    rows = stored_order(tensor.detach(), transpose=transpose, interleave=interleave)
    if rows.shape[-1] % BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide rows of {rows.shape[-1]}")
    shape = (*_rows(rows.shape[:-1], merged=interleave), rows.shape[-1] // BLOCK)
    if out is None:
        memory = partial(torch.empty, dtype=torch.uint8, device=tensor.device)
        out = Encoded(memory((*shape, BYTES)), memory(shape))
    blocks, scales = out
    _require_bytes(blocks, scales)
    if not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError("blocks and scales to write to must be contiguous")
    if scales.shape != shape or (hint is not None and hint.shape != shape):
        raise ValueError(f"scales and hint must be {list(shape)} for {list(tensor.shape)}")
    if hint is not None and hint.dtype != torch.uint8:
        raise ValueError(f"the hint must be uint8, not {hint.dtype}")
    if tensor.numel() == 0:
        return out
    view = four_dims(rows)
    places = (view.shape[0], view.shape[1] * view.shape[2], shape[-1])
    wanted = None if hint is None else hint.contiguous().view(places)
    kernel = choose(tensor.device, backend)
    kernel.encode(view, rule, wanted, blocks.view(*places, BYTES), scales.view(places))
    if on_nonfinite == "nan" and not originals:
        return out  # without waiting for a GPU
    if int(scales.max()) == NAN_SCALE:  # without a mask, which would be memory beyond the result
        broken = scales == NAN_SCALE
        if hint is not None and originals and (before := originals()) is not None:
            broken = _put_back(rows, hint, before, out, broken)
        if on_nonfinite != "nan":
            _settle_nonfinite(rows, rule, hint, out, broken, saturate=on_nonfinite == "saturate")
    return out


def _put_back(
    rows: Tensor, hint: Tensor, originals: Tensor, out: Encoded, broken: Tensor
) -> Tensor:
    """Give blocks their original bytes that decode to the same; which blocks are still broken."""
    once = decode(originals[broken], hint[broken]).view(-1, BLOCK).to(rows.dtype)
    values = _blocks_at(rows, broken)
    alike = (values == once) & (values.signbit() == once.signbit()) | values.isnan() & once.isnan()
    known = broken.clone()
    known[broken] = alike.all(1)
    out.blocks[known], out.scales[known] = originals[known], hint[known]
    return broken & ~known


def _settle_nonfinite(
    rows: Tensor, rule: Rule, hint: Tensor | None, out: Encoded, broken: Tensor, *, saturate: bool
) -> None:
    """Raise for blocks that were encoded as NaN, or encode them again with infinities cut down."""
    places = broken.nonzero()
    values = _blocks_at(rows, broken)
    nan, infinite = values.isnan().any(1), values.isinf().any(1)
    hopeless = nan if saturate else nan | infinite
    if bool(hopeless.any()):
        places = places[hopeless]
        has = {"NaN": bool(nan[hopeless][0]), "infinity": bool(infinite[hopeless][0])}
        holds = " and ".join(what for what, there in has.items() if there)
        raise NonFiniteError(tuple(places[0].tolist()), len(places), holds, bool(nan.any()))
    wanted = None if hint is None else hint[broken][:, None]
    again = encode(values.clamp(-LARGEST, LARGEST), rule=rule, hint=wanted, backend="table")
    out.blocks[broken], out.scales[broken] = again.blocks[:, 0], again.scales[:, 0]


def _blocks_at(rows: Tensor, where: Tensor) -> Tensor:
    """``[N, 32]`` values, of blocks by a mask of the scales' shape."""
    blocks: Tensor = rows.unflatten(-1, (-1, BLOCK))
    return blocks[where.view(*rows.shape[:-1], -1)]


def spoiled(blocks: Tensor, scales: Tensor) -> tuple[int, int, Tensor] | None:
    """How many values decode to infinity, being past bfloat16's largest, how many to NaN, and in
    which blocks (bool, like ``scales``); None if there are none.

    Takes no longer than a look at the scales where there are none.
    """
    if not scales.numel() or int(scales.max()) <= LARGEST_SCALE:
        return None
    where = scales > LARGEST_SCALE
    values = decode(blocks[where], scales[where]).view(-1, BLOCK)
    where[where.clone()] = ~values.isfinite().all(1)
    infinite, nan = int(values.isinf().sum()), int(values.isnan().sum())
    return (infinite, nan, where) if infinite or nan else None


def _rows(shape: torch.Size, *, merged: bool) -> tuple[int, ...]:
    """The leading dims of blocks and scales; an interleaved view has R as R/2, 2."""
    return (*shape[:-2], shape[-2] * shape[-1]) if merged else tuple(shape)


def _require_bytes(blocks: Tensor, scales: Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales must be uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.shape != (*scales.shape, BYTES):
        raise ValueError(
            f"blocks {list(blocks.shape)} and scales {list(scales.shape)} are not "
            f"[..., R, K/{BLOCK}, {BYTES}] and [..., R, K/{BLOCK}]"
        )
