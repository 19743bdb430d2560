"""MXFP4, the form in which OpenAI publishes the experts of GPT-OSS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Codec, TensorSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from gptoss_convert.types import Config

BLOCK, BYTES = 32, 16  # values per scale byte, packed bytes per block


def matches(config: Config) -> bool:
    """``quantization_config.quant_method`` is ``mxfp4``."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def spec(parts: Sequence[TensorSpec]) -> TensorSpec:
    """uint8 blocks [E, out, in/32, 16] and scales [E, out, in/32] -> BF16 [E, in, out].

    The stored orientation is the other way round than that of the BF16 checkpoints; the logical
    tensor is always theirs.
    """
    blocks, scales = parts
    for name, part in (("blocks", blocks), ("scales", scales)):
        if part.dtype != "U8":
            raise ValueError(f"its {name} are {part.dtype}, not U8")
    if len(blocks.shape) != 4 or blocks.shape[3] != BYTES or blocks.shape[:3] != scales.shape:
        raise ValueError(
            f"blocks {list(blocks.shape)} and scales {list(scales.shape)} are not "
            f"[E, out, in/{BLOCK}, {BYTES}] and [E, out, in/{BLOCK}]"
        )
    experts, rows, count = scales.shape
    return TensorSpec((experts, count * BLOCK, rows), "BF16")


def decode(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Exact; bfloat16 [E, in, out] as a view of the natural [E, out, in]."""
    from gptoss_kernels import mxfp4

    blocks, scales = parts
    return mxfp4.decode(blocks, scales, out).transpose(1, 2)


@hookimpl
def gptoss_convert_codecs() -> Iterator[Codec]:
    """Decoding only, until the encoder lands."""
    yield Codec("mxfp4", ("_blocks", "_scales"), matches, spec, decode)
