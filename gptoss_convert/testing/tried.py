"""A codec under test: every call is held to what the codec promised."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import from_torch_name, torch_dtype
from gptoss_convert.types import Codec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

GUARD = 256  # bytes on either side of memory that is lent
POISON, FENCE = 0xFF, 0xA5  # NaN in every float type; what guards are filled with


class Tried:
    """Calls a codec twice each time, without and with memory for the result, and compares.

    Args:
        codec: one that writes.
        logical: spec of a tensor it can store.
        signed_zeros: whether a zero's sign is part of its value.

    """

    def __init__(self, codec: Codec, logical: TensorSpec, signed_zeros: bool) -> None:
        self.codec, self.logical, self.signed_zeros = codec, logical, signed_zeros

    def promised(self, rows: int | None = None) -> Sequence[TensorSpec]:
        """Specs of the parts of the whole tensor, or of so many of its rows."""
        assert self.codec.parts
        shape = self.logical.shape
        return self.codec.parts(replace(self.logical, shape=(rows or shape[0], *shape[1:])))

    def hints(self, parts: Sequence[Tensor]) -> list[Tensor] | None:
        """Those of the parts that are hints, as ``encode`` gets them."""
        named = dict(zip(self.codec.suffixes, parts, strict=True))
        return [named[suffix] for suffix in self.codec.hints] or None

    def encode(
        self, tensor: Tensor, what: str, hints: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The parts, which have the promised specs."""
        specs = self.promised(len(tensor))
        made = self._call("encode", what, [tensor], [hints], specs)
        for suffix, part, spec in zip(self.codec.suffixes, made, specs, strict=True):
            found = spec_of(part)
            self.require(found == spec, f"makes {suffix} of {what} as {found}, promised is {spec}")
        return made

    def decode(self, parts: Sequence[Tensor], what: str) -> Tensor:
        """The tensor, which has the promised spec."""
        spec = self.codec.spec([spec_of(part) for part in parts])
        (made,) = self._call("decode", what, [parts], [], [spec])
        found = spec_of(made)
        self.require(found == spec, f"decodes {what} to {found}, promised is {spec}")
        if self.codec.decode_contiguous:
            (other,) = self._call("decode_contiguous", what, [parts], [], [spec])
            self.require(same(made, other), "has a decode_contiguous that differs from decode")
            self.require(other.is_contiguous(), "has a decode_contiguous whose result is not")
        return made

    def require_kept(
        self, tensor: Tensor, what: str, hints: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Encoding must change none of these values; returns the parts."""
        parts = self.encode(tensor, what, hints)
        back = self.decode(parts, what)
        kept = same(back, tensor) if self.signed_zeros else bool((back == tensor).all())
        self.require(kept, f"does not keep the values of {what}")
        return parts

    def require_parts(self, parts: Sequence[Tensor], tensor: Tensor, what: str) -> None:
        """Encoding must give these very parts."""
        for suffix, part, made in zip(
            self.codec.suffixes, parts, self.encode(tensor, what), strict=True
        ):
            self.require(same(part, made), f"makes other {suffix} of {what}")

    def require(self, holds: bool, otherwise: str) -> None:
        """Raise AssertionError, with what is wrong of the codec, unless it holds."""
        if not holds:
            raise AssertionError(f"codec {self.codec.name} {otherwise}")

    def _call(
        self,
        name: str,
        what: str,
        first: Sequence[Any],
        more: Sequence[Any],
        specs: Sequence[TensorSpec],
    ) -> list[Tensor]:
        """The result of a function as a list, tried without and with poisoned memory."""
        arguments = (*first, *more)
        inputs = [t for given in arguments if given is not None for t in given]
        before = [tensor.clone() for tensor in inputs]
        single = name != "encode"
        rooms = [_Room(replace(s, shape=(s.numel,)) if single else s) for s in specs]
        lent = rooms[0].tensor if single else [room.tensor for room in rooms]
        made = []
        for memory in (None, lent):
            try:
                found = getattr(self.codec, name)(*arguments, memory)
            except Exception as error:
                text = f"codec {self.codec.name} cannot {name} {what}"
                raise AssertionError(f"{text} ({type(error).__name__}: {error})") from error
            made.append([found] if single else list(found))
            self.require(len(made[-1]) == len(specs), f"makes {len(made[-1])} parts of {what}")
        self.require(all(map(same, before, inputs)), f"changes what is given to {name}")
        self.require(all(r.intact for r in rooms), f"writes past the memory given to {name}")
        agree = all(map(same, *made))
        self.require(agree, f"makes something else of {what} when {name} is given memory")
        return made[0]


class _Room:
    """Poisoned memory for a tensor, with a guard on either side."""

    def __init__(self, spec: TensorSpec) -> None:
        import torch

        self._whole = torch.full((spec.nbytes + 2 * GUARD,), FENCE, dtype=torch.uint8)
        self._inside = slice(GUARD, GUARD + spec.nbytes)
        inner = self._whole[self._inside].fill_(POISON)
        self.tensor = inner.view(torch_dtype(spec.dtype)).view(spec.shape)

    @property
    def intact(self) -> bool:
        """Whether both guards are untouched."""
        before, after = self._whole[:GUARD], self._whole[self._inside.stop :]
        return bool((before == FENCE).all() and (after == FENCE).all())


def spec_of(tensor: Tensor) -> TensorSpec:
    """What a tensor is."""
    return TensorSpec(tuple(tensor.shape), from_torch_name(str(tensor.dtype)))


def same(one: Tensor, other: Tensor) -> bool:
    """Shape, type and every bit."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)
