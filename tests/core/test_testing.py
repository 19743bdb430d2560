"""The kit for codecs takes good ones, and catches every way of being wrong that it says it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_convert import Codec, TensorSpec
from gptoss_convert.errors import EncodeError
from gptoss_convert.loss import Loss
from gptoss_convert.testing import assert_codec

SPEC = TensorSpec((5, 6, 14), "BF16")

# --- a good codec: two 4-bit codes (sign, 0 to 7) a byte, a power of two per matrix row -----------


def powers() -> Tensor:
    return torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan])


def spec(parts: Sequence[TensorSpec]) -> TensorSpec:
    """U8 [A, B, C/2] and U8 [A, B] -> BF16 [A, B, C]."""
    codes, scales = parts
    fits = len(codes.shape) == 3 and codes.shape[:2] == scales.shape
    if not fits or (codes.dtype, scales.dtype) != ("U8", "U8"):
        raise ValueError(f"{codes} and {scales} do not fit")
    return TensorSpec((*codes.shape[:2], 2 * codes.shape[2]), "BF16")


def parts(logical: TensorSpec) -> list[TensorSpec]:
    *rows, width = logical.shape
    if len(rows) != 2 or width % 2:
        raise ValueError(f"{logical} does not fit")
    return [TensorSpec((*rows, width // 2), "U8"), TensorSpec(tuple(rows), "U8")]


def unpacked(stored: Sequence[Tensor]) -> Tensor:
    codes, scales = stored
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
    values = (nibbles & 7) * powers()[scales.long()][..., None]
    return torch.where(nibbles > 7, -values, values).bfloat16()


def decode(stored: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    values = unpacked(stored)
    return values if out is None else out.view(values.shape).copy_(values)


def scale_of(rows: Tensor) -> Tensor:
    """So that the largest becomes 3.75 to 7.5; one that would round to 8 takes the next."""
    fraction, exponent = rows.abs().amax(-1).frexp()
    return (exponent + (fraction > 7.5 / 8) + 124).clamp(0, 252)


def encode(
    tensor: Tensor,
    hints: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
    scale_of: Callable[[Tensor], Tensor] = scale_of,
    fits: Callable[[Tensor], Tensor] = lambda exact: exact.all(-1),
) -> list[Tensor]:
    rows = tensor.float().flatten(2)
    finite = rows.isfinite().flatten(1).all(1)
    if not finite.all():
        raise EncodeError(int((~finite).nonzero()[0]), "holds NaN or infinity; mend it")
    scales = scale_of(rows)
    if hints:
        hint = hints[0].long()
        at_hint = rows / powers()[hint][..., None]
        exact = (at_hint.round() == at_hint) & (at_hint.abs() <= 7)
        exact &= at_hint.round() * powers()[hint][..., None] == rows
        scales = torch.where(fits(exact), hint, scales)
    size = (
        (rows / powers()[scales.long()][..., None]).abs().round().clamp(0, 7).nan_to_num(0).byte()
    )
    nibbles = size | rows.signbit().byte() << 3
    made = [nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales.byte()]
    return made if out is None else [room.copy_(part) for room, part in zip(out, made, strict=True)]


def measure(tensor: Tensor, stored: Sequence[Tensor]) -> Loss:
    values = tensor.flatten(2).double()
    error = decode(stored).double() - values
    kept = int((error == 0).all(-1).sum())
    squares = float(error.square().sum())
    power = float(values.square().sum())
    blocks = stored[1].numel()
    return Loss(blocks, kept, float(error.abs().max()), squares, power, values.numel())


GOOD = Codec(
    name="toy",
    suffixes=("_codes", "_scales"),
    matches=lambda config: (config.get("quantization_config") or {}).get("quant_method") == "toy",
    spec=spec,
    decode=decode,
    encode=encode,
    parts=parts,
    declare=lambda unquantized: {"quant_method": "toy", "skip": list(unquantized)},
    hints=("_scales",),
    decode_contiguous=decode,
    measure=measure,
)


def test_a_good_codec_passes() -> None:
    assert_codec(GOOD, SPEC, tolerance=0.15)
    assert_codec(replace(GOOD, hints=(), measure=None, decode_contiguous=None), SPEC)
    assert_codec(GOOD, TensorSpec((2, 64, 6), "BF16"))


def test_one_that_ignores_memory_or_returns_a_view_passes() -> None:
    def as_view(stored: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        return unpacked(stored).transpose(1, 2).contiguous().transpose(1, 2)

    without = replace(GOOD, encode=lambda tensor, hints=None, out=None: encode(tensor, hints))
    assert_codec(replace(without, decode=as_view), SPEC)


def test_one_with_a_scale_for_the_whole_tensor_passes_unless_it_calls_itself_sliceable() -> None:
    def whole(rows: Tensor) -> Tensor:
        return scale_of(rows.flatten()).expand(rows.shape[:2])

    def same(exact: Tensor) -> Tensor:
        return exact.all().expand(exact.shape[:2])

    codec = replace(
        GOOD,
        encode=lambda tensor, hints=None, out=None: encode(tensor, None, out, whole, same),
        hints=(),
    )
    assert_codec(replace(codec, sliceable=False), SPEC, any_bytes=["_codes"])
    with pytest.raises(AssertionError, match="codec toy"):
        assert_codec(codec, SPEC, any_bytes=["_codes"])


# --- bad ones ------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, Callable[[], Codec]]] = {}


def mutant(what: str) -> Callable[[Callable[[], Codec]], Callable[[], Codec]]:
    """Register a codec that has to fail with ``what``."""

    def register(make: Callable[[], Codec]) -> Callable[[], Codec]:
        MUTANTS[make.__name__] = (what, make)
        return make

    return register


def decoding(function: Callable[[Sequence[Tensor]], Tensor]) -> Codec:
    """The good codec with another decoder that takes no memory."""
    return replace(
        GOOD, decode=lambda stored, out=None: function(stored), decode_contiguous=None, measure=None
    )


def encoding(function: Callable[..., Sequence[Tensor]]) -> Codec:
    """The good codec with another encoder that takes no memory."""
    return replace(GOOD, encode=lambda tensor, hints=None, out=None: function(tensor, hints))


@mutant("is off by")
def transposed() -> Codec:
    def function(stored: Sequence[Tensor]) -> Tensor:
        values = unpacked(stored)
        return values.transpose(1, 2).reshape(values.shape)

    return decoding(function)


@mutant("is off by")
def nibbles_swapped() -> Codec:
    return decoding(lambda stored: unpacked([stored[0] << 4 | stored[0] >> 4, stored[1]]))


@mutant("is off by")
def halves_interleaved() -> Codec:
    def function(stored: Sequence[Tensor]) -> Tensor:
        return unpacked(stored).unflatten(2, (2, -1)).transpose(2, 3).flatten(2)

    return decoding(function)


@mutant("loses the sign of zeros")
def sign_of_zero_lost() -> Codec:
    return decoding(lambda stored: unpacked(stored) + 0.0)


@mutant("makes something of zeros")
def zeros_filled() -> Codec:
    def function(stored: Sequence[Tensor]) -> Tensor:
        values = unpacked(stored)
        empty = (values == 0).all(-1, keepdim=True)
        return torch.where(empty, 2.0**-100, values)

    return decoding(function)


@mutant("by themselves")
def scale_depends_on_the_slice() -> Codec:
    """Both rules would do, if it were always the same."""

    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        def rule(rows: Tensor) -> Tensor:
            fraction, exponent = rows.abs().amax(-1).frexp()
            return (exponent + (fraction > 7 / 8) + 124).clamp(0, 252)

        return encode(tensor, hints, None, rule if len(tensor) == 5 else scale_of)

    return encoding(function)


@mutant("has a spec that makes")
def parts_transposed() -> Codec:
    def wrong(logical: TensorSpec) -> list[TensorSpec]:
        codes, scales = parts(logical)
        a, b, c = codes.shape
        return [replace(codes, shape=(b, a, c)), replace(scales, shape=(b, a))]

    return replace(GOOD, parts=wrong)


@mutant("promised is U8")
def shape_not_as_promised() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        codes, scales = encode(tensor, hints)
        return [codes, scales[..., None]]

    return encoding(function)


@mutant("promised is U8")
def dtype_not_as_promised() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        codes, scales = encode(tensor, hints)
        return [codes.view(torch.int8), scales]

    return encoding(function)


@mutant("promised is BF16")
def decoded_to_another_type() -> Codec:
    return decoding(lambda stored: unpacked(stored).float())


@mutant("lets hints change values")
def hints_believed() -> Codec:
    """Those that are close, at least."""

    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        near = hints and (hints[0].int() - encode(tensor)[1].int()).abs() < 4
        return encode(tensor, hints, None, scale_of, lambda exact: exact.all(-1) | near)

    return encoding(function)


@mutant("does not give _scales back that came as hints")
def hints_ignored() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor))


@mutant("does not match the config that it declares")
def declares_another() -> Codec:
    return replace(GOOD, declare=lambda modules: {"quant_method": "toys", "skip": list(modules)})


@mutant("declares no modules that are to stay unquantized")
def declares_no_modules() -> Codec:
    return replace(GOOD, declare=lambda modules: {"quant_method": "toy", "skip": modules[:1]})


@mutant("which does not declare it")
def matches_all_that_is_quantized() -> Codec:
    return replace(GOOD, matches=lambda config: bool(config.get("quantization_config")))


@mutant("which does not declare it")
def matches_everything() -> Codec:
    return replace(GOOD, matches=lambda config: True)


@mutant("declares what JSON cannot hold")
def declares_a_tuple() -> Codec:
    return replace(
        GOOD, declare=lambda unquantized: {"quant_method": "toy", "skip": tuple(unquantized)}
    )


@mutant("writes past the memory given to encode")
def writes_outside_its_slice() -> Codec:
    def function(tensor: Tensor, hints: Any = None, out: Any = None) -> list[Tensor]:
        made = encode(tensor, hints, out)
        if out is not None:
            after = out[1].storage_offset() + out[1].numel()
            torch.empty(0, dtype=torch.uint8).set_(out[1].untyped_storage())[after] = 0
        return made

    return replace(GOOD, encode=function)


@mutant("writes past the memory given to decode")
def decodes_past_its_memory() -> Codec:
    def function(stored: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        if out is not None:
            out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0)
        return decode(stored, out)

    return replace(GOOD, decode=function)


@mutant("when encode is given memory")
def memory_taken_for_zeros() -> Codec:
    def function(tensor: Tensor, hints: Any = None, out: Any = None) -> list[Tensor]:
        codes, scales = encode(tensor, hints)
        return [codes, scales] if out is None else [out[0].bitwise_or_(codes), out[1].copy_(scales)]

    return replace(GOOD, encode=function)


@mutant("when decode is given memory")
def only_part_of_the_memory_written() -> Codec:
    def function(stored: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        values = unpacked(stored)
        if out is None:
            return values
        out.view(values.shape)[:, :-1] = values[:, :-1]
        return out.view(values.shape)

    return replace(GOOD, decode=function)


@mutant("cannot encode a view")
def demands_contiguous_memory() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor.view((*tensor.shape[:2], -1)), hints))


@mutant("of a view with dims in the order")
def ignores_strides() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        at = tensor.storage_offset()
        return encode(
            tensor.as_strided(tensor.shape, tensor.new_empty(tensor.shape).stride(), at), hints
        )

    return encoding(function)


@mutant("its last dim in two")
def demands_the_logical_dims() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        _a, _b, _c = tensor.shape
        return encode(tensor, hints)

    return encoding(function)


@mutant("changes what is given to encode")
def scales_its_input() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor.mul_(2), hints))


@mutant("in float32")
def float32_is_something_else() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        return encode(tensor * 2 if tensor.dtype == torch.float32 else tensor, hints)

    return encoding(function)


@mutant("without a word")
def infinity_swallowed() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor.nan_to_num(0.0), hints))


@mutant("not EncodeError")
def another_error_for_nan() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        if not tensor.isfinite().all():
            raise ValueError("no")
        return encode(tensor, hints)

    return encoding(function)


@mutant("when it is row 4")
def the_wrong_row_blamed() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        if not tensor.isfinite().all():
            raise EncodeError(0, "holds NaN")
        return encode(tensor, hints)

    return encoding(function)


@mutant("does not keep the values of finite values of random bytes")
def small_scales_cut_off() -> Codec:
    return encoding(
        lambda t, hints: encode(t, None, None, lambda rows: scale_of(rows).clamp(min=40))
    )


@mutant("does not keep the values of finite values of random bytes")
def one_code_taken_for_another() -> Codec:
    def function(stored: Sequence[Tensor]) -> Tensor:
        codes, scales = stored
        return unpacked([torch.where(codes == 0x77, 0x67, codes), scales])

    def encoder(tensor: Tensor, hints: Any = None, out: Any = None) -> list[Tensor]:
        codes, scales = encode(tensor, hints)
        return [torch.where(codes == 0x67, 0x66, codes), scales]

    return replace(decoding(function), encode=encoder)


@mutant("has a decode_contiguous whose result is not")
def contiguous_is_a_view() -> Codec:
    def function(stored: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        return unpacked(stored).transpose(1, 2).contiguous().transpose(1, 2)

    return replace(GOOD, decode_contiguous=function)


@mutant("has a decode_contiguous that differs from decode")
def contiguous_is_another() -> Codec:
    return replace(GOOD, decode_contiguous=lambda stored, out=None: unpacked(stored) * 2)


@mutant("for parts of one tensor")
def takes_any_parts() -> Codec:
    return replace(
        GOOD,
        spec=lambda parts: TensorSpec((*parts[0].shape[:2], 2 * parts[0].shape[2]), "BF16"),
    )


@mutant("promises more or fewer parts than suffixes")
def a_suffix_too_few() -> Codec:
    return replace(GOOD, suffixes=("_codes",), hints=())


@mutant("makes 1 parts")
def a_part_too_few() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor, hints)[:1])


@mutant("is sliceable, but dim 0")
def a_part_without_rows() -> Codec:
    def flat(logical: TensorSpec) -> list[TensorSpec]:
        codes, scales = parts(logical)
        return [codes, replace(scales, shape=(1, *scales.shape))]

    return replace(GOOD, parts=flat, spec=lambda parts: SPEC)


@mutant("has hints that are none of its parts")
def hints_misspelt() -> Codec:
    return replace(GOOD, hints=("_scale",))


@mutant("cannot write")
def only_reads() -> Codec:
    return replace(GOOD, declare=None)


@mutant("with rule coarse")
def an_option_that_loses_values() -> Codec:
    def function(
        tensor: Tensor, hints: Any = None, out: Any = None, rule: str = "fine"
    ) -> list[Tensor]:
        coarse = rule == "coarse"
        return encode(tensor, hints, out, lambda rows: scale_of(rows) + coarse)

    return replace(
        GOOD,
        encode=function,
        decode=lambda stored, out=None, rule="fine": decode(stored, out),
        decode_contiguous=None,
        options={"rule": ("fine", "coarse")},
    )


@mutant("measures largest error, squares and power")
def a_loss_made_up() -> Codec:
    return replace(GOOD, measure=lambda tensor, stored: Loss(1, 1, 0.0, 0.0, 1.0, tensor.numel()))


@mutant("measures largest error, squares and power")
def a_power_made_up() -> Codec:
    return replace(GOOD, measure=lambda t, stored: replace(measure(t, stored), power=1.0))


@mutant("kept, 1 of them being changed")
def a_count_made_up() -> Codec:
    def function(tensor: Tensor, stored: Sequence[Tensor]) -> Loss:
        found = measure(tensor, stored)
        return replace(found, kept=found.blocks)

    return replace(GOOD, measure=function)


@mutant("rounds float32 to bfloat16")
def float32_through_bfloat16() -> Codec:
    return encoding(lambda tensor, hints: encode(tensor.bfloat16(), hints))


@mutant("cannot encode them in float16")
def float16_refused() -> Codec:
    def function(tensor: Tensor, hints: Any) -> list[Tensor]:
        if tensor.dtype == torch.float16:
            raise TypeError("no float16")
        return encode(tensor, hints)

    return encoding(function)


@mutant("for parts of one tensor")
def takes_any_inner_sizes() -> Codec:
    def lax(stored: Sequence[TensorSpec]) -> TensorSpec:
        codes, scales = stored
        if (codes.dtype, scales.dtype) != ("U8", "U8") or codes.shape[0] != scales.shape[0]:
            raise ValueError("no")
        return TensorSpec((*codes.shape[:2], 2 * codes.shape[2]), "BF16")

    return replace(GOOD, spec=lax)


@mutant("has a spec that makes an error")
def parts_that_do_not_fit() -> Codec:
    def wrong(logical: TensorSpec) -> list[TensorSpec]:
        codes, scales = parts(logical)
        return [codes, replace(scales, shape=(scales.shape[0], scales.shape[1] + 1))]

    return replace(GOOD, parts=wrong)


@mutant("measures a loss where there is none")
def a_loss_where_there_is_none() -> Codec:
    return replace(GOOD, measure=lambda t, stored: replace(measure(t, stored), kept=3))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bad_codec_is_caught(name: str) -> None:
    what, make = MUTANTS[name]
    with pytest.raises(AssertionError) as caught:
        assert_codec(make(), SPEC, tolerance=0.15)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("codec toy ")
    assert what in str(caught.value)


def test_bytes_that_stand_for_nan_may_be_named() -> None:
    assert_codec(GOOD, SPEC, nan_bytes={"_scales": [255]})
    with pytest.raises(AssertionError, match="decodes _scales of 254 to numbers"):
        assert_codec(GOOD, SPEC, nan_bytes={"_scales": [255, 254]})


def test_what_a_codec_cannot_hold_may_be_declared() -> None:
    plain = decoding(lambda stored: unpacked(stored) + 0.0)
    assert_codec(plain, SPEC, signed_zeros=False)
    swallowing = encoding(lambda tensor, hints: encode(tensor.nan_to_num(0.0), hints))
    assert_codec(swallowing, SPEC, refuses_nonfinite=False)
    narrow = encoding(
        lambda t, hints: encode(t, None, None, lambda rows: scale_of(rows).clamp(min=40))
    )
    assert_codec(replace(narrow, hints=()), SPEC, any_bytes=["_codes"])


def test_options_that_this_machine_lacks_are_left_out() -> None:
    def check(**options: str) -> None:
        raise ValueError("no such device")

    def never(*given: Any, **options: str) -> Any:
        assert not options
        return encode(*given)

    codec = replace(GOOD, encode=never, check=check, options={"backend": ("gpu",)})
    assert_codec(codec, SPEC)
