"""MXFP4, the form in which OpenAI publishes the experts of GPT-OSS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptoss_convert import Codec, Spoiled, TensorSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from gptoss_convert.loss import Loss
    from gptoss_convert.types import Config

NAME = "mxfp4"
BLOCK, BYTES = 32, 16  # values per scale byte, packed bytes per block
AUTO = "auto"
OPTIONS = {
    "backend": (AUTO, "triton", "numba", "table", "reference"),
    "rule": ("even", "floor", "round_up"),
    "on_nonfinite": ("error", "nan", "saturate"),
}


def matches(config: Config) -> bool:
    """``quantization_config.quant_method`` is ``mxfp4``."""
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


def declare(unquantized: Sequence[str]) -> Mapping[str, Any]:
    """As in the published ``config.json``."""
    return {"modules_to_not_convert": list(unquantized), "quant_method": NAME}


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


def parts(logical: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The inverse of :func:`spec`."""
    if len(logical.shape) != 3:
        raise ValueError(f"MXFP4 is for tensors [E, in, out], not {list(logical.shape)}")
    experts, width, rows = logical.shape
    if width % BLOCK:
        raise ValueError(f"MXFP4 takes {BLOCK} inputs at a time, which does not divide {width}")
    shape = (experts, rows, width // BLOCK)
    return TensorSpec((*shape, BYTES), "U8"), TensorSpec(shape, "U8")


def check(backend: str = AUTO, **_: str) -> None:
    """Raise ValueError unless the backend runs on this machine."""
    import torch

    from gptoss_kernels import mxfp4

    mxfp4.chosen(_device(backend, torch.device("cpu")), backend)


def settle(device: str, backend: str = AUTO, **_: str) -> Mapping[str, str]:
    """Which backend works there."""
    import torch

    from gptoss_kernels import mxfp4

    return {"backend": mxfp4.chosen(_device(backend, torch.device(device)), backend).name}


def load(device: str, *, encodes: bool, backend: str = AUTO, **_: str) -> None:
    """Import a backend; numba's kernels come from the disk, or are compiled, when they are first used."""
    import torch

    from gptoss_kernels import mxfp4

    chosen = mxfp4.chosen(_device(backend, torch.device(device)), backend)
    chosen.load()
    if chosen.name != "numba":
        return
    if encodes:
        tensor = torch.zeros(1, BLOCK, 1, dtype=torch.bfloat16)
        measure(tensor, encode(tensor, backend=backend))
    else:
        shapes = (1, 1, 1, BYTES), (1, 1, 1)
        decode([torch.zeros(shape, dtype=torch.uint8) for shape in shapes], backend=backend)


def decode(
    parts: Sequence[Tensor], out: Tensor | None = None, backend: str = AUTO, **_: str
) -> Tensor:
    """Exact; bfloat16 [E, in, out] as a view of the natural [E, out, in]."""
    return _decode(parts, out, backend, transpose=False).transpose(1, 2)


def decode_contiguous(
    parts: Sequence[Tensor], out: Tensor | None = None, backend: str = AUTO, **_: str
) -> Tensor:
    """Exact; bfloat16 [E, in, out], contiguous."""
    return _decode(parts, out, backend, transpose=True)


def _decode(
    parts: Sequence[Tensor], out: Tensor | None, backend: str, *, transpose: bool
) -> Tensor:
    from gptoss_kernels import mxfp4

    home = parts[0].device
    device = _device(backend, home)
    blocks, scales = (part.to(device) for part in parts)
    room = out if device == home else None
    decoded = mxfp4.decode(blocks, scales, room, transpose=transpose, backend=backend)
    if device == home:
        return decoded
    return decoded.to(home) if out is None else out.view(decoded.shape).copy_(decoded)


def encode(
    tensor: Tensor,
    hints: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = AUTO,
    rule: Any = "even",
    on_nonfinite: Any = "error",
    originals: Callable[[], Tensor | None] | None = None,
) -> Sequence[Tensor]:
    """[E, in, out], or a view [E, in, ...] of the same order, to blocks and scales.

    Exact where a block is representable, and of the source's own bytes where ``hints`` (its
    scales) say how; else to nearest, ties to even. A block with NaN or infinity gets the bytes it
    has in ``originals`` (the source's blocks) if they still mean what is in it.

    Raises:
        EncodeError: a block holds NaN or infinity.

    """
    from gptoss_convert.errors import EncodeError
    from gptoss_kernels import mxfp4

    home = tensor.device
    device = _device(backend, home)
    natural = tensor.movedim(1, -1).to(device)
    groups = (*natural.shape[:-1], natural.shape[-1] // BLOCK)
    hint = hints[0].view(groups).to(device) if hints else None
    room = None
    if out is not None and device == home:
        room = mxfp4.Encoded(out[0].view(*groups, BYTES), out[1].view(groups))

    def before() -> Tensor | None:
        blocks = originals and originals()
        return None if blocks is None else blocks.view(*groups, BYTES).to(device)

    try:
        made = mxfp4.encode(
            natural,
            rule=rule,
            hint=hint,
            on_nonfinite=on_nonfinite,
            out=room,
            backend=backend,
            originals=originals and before,
        )
    except mxfp4.NonFiniteError as error:
        expert, *place, group = error.block
        row = _row(place, natural.shape[1:-1])
        way_out = "nan" if error.any_nan else "nan or saturate"
        raise EncodeError(
            expert,
            f"output {row}, inputs {group * BLOCK} to {group * BLOCK + BLOCK - 1} hold "
            f"{error.holds}, which MXFP4 cannot; mend the checkpoint, or say --on-nonfinite {way_out}",
        ) from None
    shape = (len(tensor), -1, groups[-1])
    return made.blocks.to(home).view(*shape, BYTES), made.scales.to(home).view(shape)


def measure(tensor: Tensor, parts: Sequence[Tensor]) -> Loss:
    """What encoding lost, block by block."""
    from gptoss_convert.loss import Loss
    from gptoss_kernels.mxfp4.loss import loss

    return Loss(*loss(tensor.movedim(1, -1), *parts))


def spoiled(parts: Sequence[Tensor]) -> Spoiled | None:
    """What decodes to infinity and to NaN."""
    from gptoss_kernels import mxfp4

    found = mxfp4.spoiled(*parts)
    return found and Spoiled(*found)


def _device(backend: str, home: torch.device) -> torch.device:
    """Where the tensors are; Triton works on the GPU if there is one, wherever they are."""
    import torch

    if backend == "triton" and home.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return home


def _row(place: Sequence[int], sizes: Sequence[int]) -> int:
    """The row-major number of a place."""
    number = 0
    for index, size in zip(place, sizes, strict=True):
        number = number * size + index
    return number


@hookimpl
def gptoss_convert_codecs() -> Iterator[Codec]:
    """Both ways; the scales are what its bytes cannot be had back without."""
    yield Codec(
        NAME,
        ("_blocks", "_scales"),
        matches,
        spec,
        decode,
        encode,
        parts=parts,
        declare=declare,
        hints=("_scales",),
        options=OPTIONS,
        check=check,
        decode_contiguous=decode_contiguous,
        measure=measure,
        settle=settle,
        load=load,
        spoiled=spoiled,
    )
