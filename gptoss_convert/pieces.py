"""A step cut into pieces: which rows a piece is, reading them, decoding them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.errors import ConvertError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gptoss_convert.fit import Input
    from gptoss_convert.plan import Output, Step
    from gptoss_convert.scratch import Scratch
    from gptoss_convert.types import TensorSource


@dataclass(frozen=True)
class Piece:
    """Units ``[start, stop)`` of a step; ``before`` units of it have been written."""

    step: Step
    start: int
    stop: int
    before: int

    def rows(self, size: int) -> slice:
        """The piece's part of a dim 0 of ``size``."""
        each = size // self.step.units
        return slice(self.start * each, self.stop * each)

    def place(self, output: Output) -> slice:
        """The rows of dim 0 of what is written that the piece makes."""
        if not output.spec.shape:
            return slice(0, 1)
        each = output.spec.shape[0] // self.step.units
        count = (self.stop - self.start) * each
        if output.box and self.step.units == 1:
            count = output.written.shape[0]
        return slice(self.before * each, self.before * each + count)


def read_parts(source: TensorSource, piece: Piece, of: Input, scratch: Scratch) -> list[Tensor]:
    """The stored parts of an input, as far as the piece needs them."""
    rows = piece.rows(of.spec.shape[0]) if of.spec.shape else None
    if piece.step.units == 1 and of.codec:
        rows = None
    return [source.read(name, rows, scratch) for name, _ in of.parts]


def decoded(of: Input, parts: Sequence[Tensor], scratch: Scratch, *, as_is: bool) -> Tensor:
    """A piece of a logical tensor from its stored parts, in memory of ``scratch`` if it is encoded.

    Args:
        of: what the parts are of.
        parts: as :func:`read_parts` gave them.
        scratch: memory for the result.
        as_is: whether contiguous logical order is wanted, rather than any view of it.

    """
    if of.codec is None:
        return parts[0]
    whole = of.spec.shape[0] if of.spec.shape else 1
    share = of.spec.nbytes
    if of.codec.sliceable and of.spec.shape:
        share = share // whole * parts[0].shape[0]
    out = scratch.take(share).view(torch_dtype(of.spec.dtype))
    decode = (as_is and of.codec.decode_contiguous) or of.codec.decode
    decoded = decode(parts, out)
    if decoded.dtype != out.dtype:
        raise ConvertError(
            f"{of.name}: codec {of.codec.name} made {decoded.dtype} where it promised "
            f"{of.spec.dtype}; report it to its plugin"
        )
    return decoded


def require_equal(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> None:
    """A tensor that is stored under several names must be the same under each."""
    import torch

    for other, tensor in zip(inputs[1:], tensors[1:], strict=True):
        if not torch.equal(tensors[0], tensor):
            raise MismatchError(
                f"{inputs[0].name} and {other.name} are two names of one tensor, and their "
                f"values differ; remove the stale one"
            )
