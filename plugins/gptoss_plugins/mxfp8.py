"""MXFP8: 32 values share a power of two and take a byte each. docs/codecs.md explains this file.

OCP Microscaling Formats (MX) v1.0: a value is ``element * 2**(scale - 127)``, with the element in
E4M3 (OCP 8-bit Floating Point, OFP8) and the scale a byte. Scale 255 is NaN; so are the elements
0x7F and 0xFF.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from gptoss_convert import Codec, TensorSpec, hookimpl
from gptoss_convert.errors import EncodeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from gptoss_convert.types import Config

NAME = "mxfp8"
BLOCK = 32  # values per scale
PIECE = 1 << 17  # elements at work at a time: in float32, and several times over
LARGEST = 1.875 * 2.0**127  # the largest magnitude that bfloat16 and the form both have


def spec(parts: Sequence[TensorSpec]) -> TensorSpec:
    """F8_E4M3 elements [E, out, in] and U8 scales [E, out, in/32] -> BF16 [E, in, out]."""
    elements, scales = parts
    if (elements.dtype, scales.dtype) != ("F8_E4M3", "U8"):
        raise ValueError(f"its parts are {elements.dtype} and {scales.dtype}, not F8_E4M3 and U8")
    experts, rows, width = elements.shape if len(elements.shape) == 3 else (0, 0, 0)
    if width % BLOCK or scales.shape != (experts, rows, width // BLOCK):
        raise ValueError(
            f"elements {list(elements.shape)} and scales {list(scales.shape)} are not "
            f"[E, out, in] and [E, out, in/{BLOCK}]"
        )
    return TensorSpec((experts, width, rows), "BF16")


def parts(logical: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The inverse of :func:`spec`."""
    if len(logical.shape) != 3:
        raise ValueError(f"MXFP8 is for tensors [E, in, out], not {list(logical.shape)}")
    experts, width, rows = logical.shape
    if width % BLOCK:
        raise ValueError(f"MXFP8 takes {BLOCK} inputs at a time, which does not divide {width}")
    scales = (experts, rows, width // BLOCK)
    return TensorSpec((experts, rows, width), "F8_E4M3"), TensorSpec(scales, "U8")


def matches(config: Config) -> bool:
    """``quantization_config.quant_method`` is ``mxfp8``."""
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


def declare(unquantized: Sequence[str]) -> Mapping[str, Any]:
    """What :func:`matches` looks for, and what a loader has to leave alone."""
    return {"modules_to_not_convert": list(unquantized), "quant_method": NAME}


def decode(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """bfloat16 [E, in, out], as a view of the natural [E, out, in].

    Exact for scales 3 to 246. A product has four significant bits, and bfloat16 eight, so only the
    ends of its range matter: up to 246 even 448 is finite (448 * 2**119 = 1.75 * 2**127), and from
    3 on the least element, 2**-9, is a multiple of bfloat16's least, 2**-133. Above 246, products
    of 2**128 and more become infinite; below 3, those between two multiples of 2**-133 become the
    nearest, ties to even.
    """
    import torch

    elements, scales = parts
    if out is None:
        out = elements.new_empty(elements.numel(), dtype=torch.bfloat16)
    natural = out.view(elements.shape)
    for place in pieces(elements):
        blocks = elements[place].unflatten(-1, (-1, BLOCK))
        natural[place] = multiplied(blocks, scales[place]).flatten(-2)
    return natural.transpose(1, 2)


def encode(
    tensor: Tensor, hints: Sequence[Tensor] | None = None, out: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """[E, in, out], or a view [E, in, ...] of the same order, to elements and scales.

    Computed in float32, from bfloat16, float16 and float32 alike. What MXFP8 can hold keeps its
    value, and a zero its sign, so decoding and encoding again changes no finite value. The rest
    goes to the nearest element at the block's scale, ties to even. Nothing finite becomes infinite:
    past LARGEST it becomes LARGEST.

    With ``hints`` (the scales of the source) a block that is exact at its old scale is written at
    it. So a source's bytes come back, except in blocks that decoding had to round (scales 0 to 2)
    or that are not finite. A wrong hint changes bytes, never a value.

    Raises:
        EncodeError: an expert holds NaN or infinity.

    """
    import torch

    natural = tensor.movedim(1, -1)  # [E, ..., in], a view: rows in the order they are stored
    shared = (*natural.shape[:-1], natural.shape[-1] // BLOCK)
    if out is None:
        rows = (len(tensor), natural.shape[1:-1].numel())
        elements = tensor.new_empty((*rows, natural.shape[-1]), dtype=torch.float8_e4m3fn)
        out = elements, tensor.new_empty((*rows, shared[-1]), dtype=torch.uint8)
    elements, scales = out[0].view(natural.shape), out[1].view(shared)
    for place in pieces(natural):
        blocks = natural[place].float().contiguous().unflatten(-1, (-1, BLOCK))
        amax = blocks.abs().amax(-1)
        if not amax.isfinite().all():
            raise EncodeError(place[0], "holds NaN or infinity; mend the checkpoint")
        blocks = blocks.clamp(-LARGEST, LARGEST)
        scale = scale_for(amax)
        if hints:
            old = hints[0].view(shared)[place]
            exact = (multiplied(divided(blocks, old), old) == blocks).all(-1)  # NaN equals nothing
            scale = torch.where(exact, old, scale)
        elements[place] = divided(blocks, scale).flatten(-2)
        scales[place] = scale
    return out


def scale_for(amax: Tensor) -> Tensor:
    """The scale byte of blocks whose largest magnitudes these are; 118 if all are zero.

    The exponent is OCP's, ``floor(log2(amax)) - 8`` (448, the largest element, is ``1.75 * 2**8``),
    and one more where ``amax`` would be past 464 and round to 480, which OCP cuts down to 448. So
    every error is at most half a step. OCP's rule would not even keep what MXFP8 itself can hold:
    a block may have 240 for its largest, and that is 480 at the scale below.
    """
    fraction, exponent = amax.clamp(max=LARGEST).frexp()  # 1/2 <= fraction < 1
    return (exponent - 9 + (fraction > 464 / 512) + 127).clamp(min=0).byte()


def divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Float32 [..., 32] -> E4M3, to nearest even; NaN where too large."""
    import torch

    return (blocks / powers(scale.device)[scale.long()][..., None]).to(torch.float8_e4m3fn)


def multiplied(elements: Tensor, scale: Tensor) -> Tensor:
    """E4M3 [..., 32] -> float32, which holds every finite product exactly."""
    return elements.float() * powers(scale.device)[scale.long()][..., None]


@cache
def powers(device: torch.device) -> Tensor:
    """What the 256 scale bytes stand for; ``torch.pow`` need not be exact."""
    import torch

    values = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*values, torch.nan], device=device)


def pieces(tensor: Tensor) -> Iterator[tuple[int, slice]]:
    """Places ``[expert, rows]`` of about ``PIECE`` elements in a tensor [E, rows, ...]."""
    experts, rows = tensor.shape[:2]
    step = max(1, PIECE // (tensor.numel() // (experts * rows)))
    for expert in range(experts):
        yield from ((expert, slice(start, start + step)) for start in range(0, rows, step))


@hookimpl
def gptoss_convert_codecs() -> Iterator[Codec]:
    """Both ways; the scales are what its bytes cannot be had back without."""
    yield Codec(
        name=NAME,
        suffixes=("_elements", "_scales"),
        matches=matches,
        spec=spec,
        decode=decode,
        encode=encode,
        parts=parts,
        declare=declare,
        hints=("_scales",),
    )
