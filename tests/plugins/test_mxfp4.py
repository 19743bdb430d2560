"""The mxfp4 codec as the core drives it: forms, layouts, slices, hints, options, what it measures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_convert import Spoiled, TensorSpec
from gptoss_convert.encoding import bind
from gptoss_convert.errors import EncodeError, UsageError
from gptoss_convert.ops import Experts
from gptoss_convert.testing import assert_codec
from gptoss_convert.types import Codec
from gptoss_plugins.gptoss import UNQUANTIZED
from gptoss_plugins.mxfp4 import OPTIONS, gptoss_convert_codecs

# Triton's interpreter multiplies by numpy, which warns where decoding overflows, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")
(CODEC,) = gptoss_convert_codecs()
PUBLISHED = Path(__file__).parent / "published"
E, OUT, IN = 3, 14, 96
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([sign * value for sign in (1, -1) for value in E2M1], dtype=torch.float64)
POWERS = torch.tensor([2.0 ** (s - 127) for s in range(255)] + [math.nan], dtype=torch.float64)


def usable(backend: str) -> bool:
    try:
        bind(CODEC, {"backend": backend})
    except UsageError:
        return False
    return True


BACKENDS = [name for name in OPTIONS["backend"] if usable(name)]
backends = pytest.mark.parametrize("backend", BACKENDS)


def with_backend(name: str, **options: str) -> Codec:
    return bind(CODEC, {"backend": name, **options})


def pack(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(blocks: Tensor) -> Tensor:
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)


def defined(blocks: Tensor, scales: Tensor) -> Tensor:
    """float64 ``[E, in, out]``."""
    values = VALUES[unpack(blocks).long()] * POWERS[scales.long()][..., None]
    return values.flatten(-2).transpose(1, 2)


def every_kind(low: int = 0, high: int = 253) -> tuple[Tensor, Tensor]:
    """Blocks ``[E, OUT, IN/32, 16]`` and scales; every largest code, both zeros, empty blocks."""
    noise = torch.Generator().manual_seed(1)
    shape = (E, OUT, IN // 32)
    codes = torch.randint(16, (*shape, 32), generator=noise, dtype=torch.uint8)
    most = torch.arange(math.prod(shape)).view(*shape, 1).remainder(8).byte()
    codes = (codes & 8) | torch.minimum(codes & 7, most)
    scales = torch.randint(low, high, shape, generator=noise, dtype=torch.uint8)
    return pack(codes), scales


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def as_megatron_has_it(logical: Tensor) -> Tensor:
    """The gate/up weight ``[E, in, out]`` as the export hands it over: a view of Megatron's memory."""
    op = Experts(transpose=True, interleaved=True)
    stored = op.forward([logical]).reshape(E, OUT, IN)
    (view,) = op.inverse(stored)
    assert torch.equal(view.reshape(logical.shape).nan_to_num(7), logical.nan_to_num(7))
    assert view.data_ptr() == stored.data_ptr(), "it is not a view, so this tests nothing"
    return view


# ---- the form


def test_form_both_ways() -> None:
    logical = TensorSpec((5, 96, 14), "BF16")
    stored = CODEC.parts(logical)
    assert stored == (TensorSpec((5, 14, 3, 16), "U8"), TensorSpec((5, 14, 3), "U8"))
    assert CODEC.spec(stored) == logical
    assert sum(part.nbytes for part in stored) * 64 == logical.nbytes * 17


@pytest.mark.parametrize(
    ("shape", "says"),
    [((5, 100, 14), "does not divide 100"), ((96, 14), "not [96, 14]"), ((2, 5, 96, 14), "not")],
)
def test_what_has_no_form(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match="MXFP4") as caught:
        CODEC.parts(TensorSpec(shape, "BF16"))
    assert says in str(caught.value)


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_declares_what_openai_declares(size: str) -> None:
    config = json.loads((PUBLISHED / f"config_{size}.json").read_text())
    assert CODEC.declare(UNQUANTIZED) == config["quantization_config"]
    assert CODEC.matches(config)
    for other in (
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "x"}},
    ):
        assert not CODEC.matches(other)


# ---- decoding


@backends
def test_decodes_all_scales_and_codes_both_ways_round(backend: str) -> None:
    """256 scale bytes times 16 codes, ``[256, 32, 2]``: square enough to be mistaken, were it not."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(4).view(1, 2, 1, 32).expand(256, 2, 1, 32)
    blocks, scales = (
        pack(codes.contiguous()),
        torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 2, 1).contiguous(),
    )
    blocks[:, 1] = blocks[:, 1].flip(-1)
    want = defined(blocks, scales)
    most = torch.finfo(torch.bfloat16).max
    want = torch.where(want.abs() > most, want.sign() * math.inf, want).bfloat16()
    codec = with_backend(backend)
    for decode in (codec.decode, codec.decode_contiguous):
        found = decode([blocks, scales])
        assert (found.dtype, found.shape) == (torch.bfloat16, (256, 32, 2))
        number = ~want.isnan()
        assert torch.equal(bits(found)[number], bits(want)[number])
        assert found[~number].isnan().all()
        assert torch.equal(~number[:, 0, 0], torch.arange(256) == 255)
    assert codec.decode_contiguous([blocks, scales]).is_contiguous()


@backends
def test_decodes_into_the_memory_it_is_given(backend: str) -> None:
    blocks, scales = every_kind()
    want = defined(blocks, scales).bfloat16()
    codec = with_backend(backend)
    for decode in (codec.decode, codec.decode_contiguous):
        room = torch.full((E * OUT * IN + 2,), math.nan, dtype=torch.bfloat16)
        out = room[:-2]
        found = decode([blocks, scales], out)
        assert found.data_ptr() == out.data_ptr()
        assert torch.equal(bits(found), bits(want))
        assert room[-2:].isnan().all()


# ---- encoding


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("view", ["logical", "natural", "megatron"])
def test_gives_the_bytes_back_from_every_layout(
    backend: str, dtype: torch.dtype, view: str
) -> None:
    blocks, scales = every_kind()
    logical = defined(blocks, scales).to(dtype)
    tensor = {
        "logical": logical.contiguous(),
        "natural": logical.transpose(1, 2).contiguous().transpose(1, 2),
        "megatron": as_megatron_has_it(logical),
    }[view]
    made = with_backend(backend).encode(tensor, [scales])
    assert [part.dtype for part in made] == [torch.uint8] * 2
    assert torch.equal(made[0], blocks)
    assert torch.equal(made[1], scales)


@backends
@pytest.mark.parametrize("rule", OPTIONS["rule"])
def test_without_a_hint_values_stay(backend: str, rule: str) -> None:
    blocks, scales = every_kind()
    tensor = as_megatron_has_it(defined(blocks, scales).bfloat16())
    made = with_backend(backend, rule=rule).encode(tensor)
    assert not torch.equal(made[1], scales)
    want = defined(blocks, scales)
    assert torch.equal(defined(*made).view(want.shape).signbit(), want.signbit())
    assert torch.equal(defined(*made), want)
    assert CODEC.measure(tensor, made).kept == scales.numel()


@backends
@pytest.mark.parametrize("offset", [-9, -3, -2, -1, 1, 2, 3, 9, 127, 128])
def test_a_wrong_hint_changes_no_value(backend: str, offset: int) -> None:
    blocks, scales = every_kind()
    wrong = (scales.int() + offset).remainder(256).byte()
    made = with_backend(backend).encode(defined(blocks, scales).bfloat16(), [wrong])
    want = defined(blocks, scales)
    assert torch.equal(defined(*made), want)
    assert torch.equal(defined(*made).signbit(), want.signbit())


@backends
def test_expert_by_expert_into_given_memory(backend: str) -> None:
    """As the export cuts it: rows of dim 0, each into its rows of one piece of memory."""
    blocks, scales = every_kind()
    codec = with_backend(backend)
    tensor = as_megatron_has_it(defined(blocks, scales).bfloat16())
    room = torch.full_like(blocks, 0xEE), torch.full_like(scales, 0xEE)
    for expert in (2, 0, 1):
        rows = slice(expert, expert + 1)
        out = [part[rows] for part in room]
        made = codec.encode(tensor[rows], [scales[rows]], out)
        for part, memory in zip(made, out, strict=True):
            assert part.data_ptr() == memory.data_ptr()
    assert torch.equal(room[0], blocks)
    assert torch.equal(room[1], scales)


@backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_names_the_first_block_it_cannot_hold(backend: str, value: float) -> None:
    """Expert, output in the order in which blocks are stored, and inputs."""
    logical = defined(*every_kind(100, 130)).bfloat16()
    for place in ((1, 70, 9), (1, 3, 12), (2, 0, 0)):
        logical[place] = value
    what = "NaN" if math.isnan(value) else "infinity"
    for tensor in (logical, as_megatron_has_it(logical)):
        with pytest.raises(EncodeError, match=f"output 9, inputs 64 to 95 hold {what}, ") as caught:
            with_backend(backend).encode(tensor)
        assert caught.value.row == 1


@backends
def test_half_precision_and_float32_keep_what_they_are(backend: str) -> None:
    """A value that bfloat16 would round to a midpoint, and then to the even side."""
    tensor = torch.zeros(1, 32, 1)
    tensor[0, :3, 0] = torch.tensor([6.0, 2.5 * (1 + 2.0**-10), -3.5 * (1 - 2.0**-10)])
    codec = with_backend(backend)
    for dtype, want in (
        (torch.float32, [7, 5, 13]),
        (torch.float16, [7, 5, 13]),
        (torch.bfloat16, [7, 4, 14]),
    ):
        blocks, scales = codec.encode(tensor.to(dtype))
        assert unpack(blocks)[0, 0, 0, :3].tolist() == want
        assert scales.item() == 127


# ---- what it measures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_measures_what_was_lost(dtype: torch.dtype) -> None:
    """Against float64, over blocks of which some are exact."""
    logical = defined(*every_kind(100, 130)).to(dtype)
    logical[:, 32:64] *= 1.04
    tensor = as_megatron_has_it(logical)
    parts = CODEC.encode(tensor)
    found = CODEC.measure(tensor, parts)
    value = logical.double().transpose(1, 2).reshape(-1, 32)
    error = defined(*parts).transpose(1, 2).reshape(-1, 32) - value
    assert found.blocks == E * OUT * IN // 32
    assert found.kept == int((error == 0).all(1).sum())
    assert E * OUT * 2 <= found.kept < found.blocks
    assert found.elements == value.numel()
    assert found.largest == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert found.squares == pytest.approx(float(error.square().sum()), rel=1e-6)
    assert found.power == pytest.approx(float(value.square().sum()), rel=1e-6)


def test_a_sign_that_is_lost_counts() -> None:
    blocks, scales = every_kind(100, 130)
    tensor = defined(blocks, scales).bfloat16()
    wrong = blocks.clone()
    at = tuple((unpack(blocks)[..., 0] & 7 == 0).nonzero()[0].tolist())
    wrong[(*at, 0)] ^= 8  # a zero gets the other sign
    assert CODEC.measure(tensor, [wrong, scales]).kept == scales.numel() - 1


@pytest.mark.parametrize("scale", [0, 1, 20, 60, 200, 240, 252])
def test_measures_at_the_ends_of_the_range(scale: int) -> None:
    """Squares that float32 cannot hold, too large or too small, are counted all the same."""
    blocks, scales = every_kind(scale, scale + 1)
    tensor = defined(blocks, scales).float() * 1.04
    parts = CODEC.encode(tensor)
    found = CODEC.measure(tensor, parts)
    error = defined(*parts) - tensor.double()
    assert found.kept < found.blocks
    assert found.largest == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert found.squares == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert found.power == pytest.approx(float(tensor.double().square().sum()), rel=1e-5)
    assert found.sqnr is not None


# ---- options


def test_options_reach_both_directions() -> None:
    """What is bound is what runs: a rule shows in the scales, a backend that is not there stops."""
    tensor = torch.full((1, 32, 1), 1.75)
    scales = {
        rule: bind(CODEC, {"rule": rule}).encode(tensor)[1].item() for rule in OPTIONS["rule"]
    }
    assert scales == {"even": 126, "floor": 125, "round_up": 126}
    tensor = torch.full((1, 32, 1), 1.6)
    assert bind(CODEC, {"rule": "even"}).encode(tensor)[1].item() == 125
    assert bind(CODEC, {"rule": "round_up"}).encode(tensor)[1].item() == 126
    assert bind(CODEC, {}) is CODEC


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "ceil"}, "even, floor, round_up"),
        ({"on_nonfinite": "drop"}, "error, nan, saturate"),
        ({"backend": "gpu"}, "triton, numba, table, reference"),
        ({"threads": "3"}, "backend, rule, on_nonfinite"),
    ],
)
def test_options_there_are_none_of(options: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        bind(CODEC, options)
    assert says in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_defaults_are_the_first_choices() -> None:
    noise = torch.Generator().manual_seed(5)
    tensor = torch.randn(E, IN, OUT, generator=noise)
    first = {name: choices[0] for name, choices in OPTIONS.items()}
    one, two = CODEC.encode(tensor), bind(CODEC, first).encode(tensor)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[1], bind(CODEC, {"rule": "round_up"}).encode(tensor)[1])


def test_backends_agree_on_what_was_never_mxfp4() -> None:
    noise = torch.Generator().manual_seed(6)
    made = {}
    for dtype, rule in itertools.product((torch.bfloat16, torch.float32), OPTIONS["rule"]):
        tensor = torch.randn(E, IN, OUT, generator=noise).mul_(0.02).to(dtype)
        hints = torch.randint(110, 125, (E, OUT, IN // 32), generator=noise, dtype=torch.uint8)
        made = {
            backend: with_backend(backend, rule=rule).encode(tensor, [hints])
            for backend in BACKENDS
        }
        for backend, parts in made.items():
            for part, want in zip(parts, made["reference"], strict=True):
                assert torch.equal(part, want), (backend, dtype, rule)
    assert {"auto", "table", "reference"} <= made.keys()


@pytest.mark.parametrize("shape", [(3, 64, 98), (5, 96, 2), (2, 32, 35)])
def test_keeps_the_contract_of_codecs(shape: tuple[int, ...]) -> None:
    assert_codec(CODEC, TensorSpec(shape, "BF16"), nan_bytes={"_scales": [255]})


def miscounted(parts: Sequence[Tensor]) -> Spoiled | None:
    found = CODEC.spoiled(parts)
    return found and found._replace(infinite=found.infinite + 1)


def forgetful(*given: Any, originals: Any = None) -> Any:
    return CODEC.encode(*given, on_nonfinite="nan" if originals else "error")


def credulous(*given: Any, originals: Any = None) -> Any:
    made = list(CODEC.encode(*given, originals=originals))
    if originals:
        kept = originals()
        made[0] = torch.where((kept != 0).any(-1, keepdim=True), kept, made[0])
    return made


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("does not find", {"spoiled": lambda parts: None}),
        ("infinite and NaN values, which are", {"spoiled": miscounted}),
        ("does not put back", {"encode": forgetful}),
        ("puts back what is no longer", {"encode": credulous}),
    ],
)
def test_the_kit_sees_what_is_not_finite_being_lost(what: str, changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=what):
        assert_codec(replace(CODEC, options={}, **changes), TensorSpec((3, 64, 26), "BF16"))
