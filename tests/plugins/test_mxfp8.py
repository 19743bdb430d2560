"""The mxfp8 codec, by the definitions of its format written out in fractions, and on checkpoints.

OCP Microscaling Formats (MX) v1.0, 5.3 and 6.3; E4M3 as in OCP 8-bit Floating Point (OFP8) v1.0, 5.1.
"""

from __future__ import annotations

import bisect
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import TensorSpec
from gptoss_convert.errors import EncodeError
from gptoss_convert.testing import assert_codec, distinct
from gptoss_plugins import mxfp8
from gptoss_plugins.gptoss import UNQUANTIZED

(CODEC,) = mxfp8.gptoss_convert_codecs()
EXPERTS = ("gate_up_proj", "down_proj")


# --- the definition ------------------------------------------------------------------------------


def e4m3(code: int) -> Fraction | None:
    """An element's value; None for NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return None
    lead = 8 * (exponent > 0) + mantissa
    return (-1) ** (code >> 7) * lead * Fraction(2) ** (max(exponent, 1) - 10)


ELEMENTS = [e4m3(code) for code in range(256)]
POSITIVE = [value for value in ELEMENTS[:127] if value is not None]  # ascending, by code


def power(scale: int) -> Fraction:
    return Fraction(2) ** (scale - 127)


def bfloat16(value: Fraction, negative: bool) -> int:
    """The bits of the nearest bfloat16, ties to even; infinite from 2**128 - 2**119 on."""
    size = abs(value)
    exponent = max(-126, math.floor(math.log2(size))) if size else -126
    steps = round(size / Fraction(2) ** (exponent - 7))  # Python's rounding is to even
    bits = steps + ((exponent + 126) << 7) if steps else 0  # a carry goes into the exponent
    return min(bits, 0x7F80) | negative << 15


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16).int() & 0xFFFF


def everything() -> tuple[Tensor, Tensor]:
    """Every element at every scale: elements [2, 256, 256], scales [2, 256, 8]; row s has scale s,
    and in the second expert row s has scale 255 - s and the elements backwards.
    """
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    elements = torch.stack([codes, codes.flip(1)]).view(torch.float8_e4m3fn)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8)
    return elements, torch.stack([scales, scales.flip(0)])


def test_every_element_at_every_scale_decodes_as_defined() -> None:
    elements, scales = everything()
    decoded = CODEC.decode((elements, scales))
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, (2, 256, 256))
    inexact = set()
    for scale in range(255):
        row = bits(decoded[0, :, scale]).tolist()
        for code, value in enumerate(ELEMENTS):
            if value is None:
                assert decoded[0, code, scale].isnan()
                continue
            product = value * power(scale)
            assert row[code] == bfloat16(product, code > 127), (scale, code)
            back = float(decoded[0, code, scale])
            if not math.isfinite(back) or Fraction(back) != product:
                inexact.add(scale)
    assert decoded[0, :, 255].isnan().all()
    assert inexact == {0, 1, 2, *range(247, 255)}  # what the docstring of decode says
    other = decoded[1].flip(0, 1)
    number = ~other.isnan()
    assert torch.equal(number, ~decoded[0].isnan())
    assert torch.equal(other[number], decoded[0][number])


# --- back again ----------------------------------------------------------------------------------


def surroundings(noise: torch.Generator) -> list[tuple[str, Tensor]]:
    """Codes [256, 256, 32]: for every code blocks that have it, all scales alike."""
    code = torch.arange(256, dtype=torch.uint8).expand(256, 256)[..., None]
    uniform = code.expand(256, 256, 32).clone()
    alone = torch.zeros_like(uniform)
    alone[..., 17:18] = code
    among = torch.randint(256, (256, 256, 32), generator=noise, dtype=torch.uint8)
    among = torch.where(
        (among & 127) > (code & 127), among & 0x80 | code & 127, among
    )  # it is largest
    among[..., 5:6] = code
    return [("uniform", uniform), ("alone", alone), ("among smaller ones", among)]


def test_decoding_and_encoding_again_changes_no_value_and_with_hints_no_byte() -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256)
    told = 0
    for what, codes in surroundings(torch.Generator().manual_seed(1)):
        elements = codes.view(256, 1, 256 * 32).view(torch.float8_e4m3fn)
        stored = elements, scales.reshape(256, 1, 256).contiguous()
        decoded = CODEC.decode(stored)
        finite = decoded.isfinite().view(256, 256, 32).all(-1)
        clean = decoded.where(finite[..., None].expand(256, 256, 32).reshape(256, -1, 1), 0)
        for hints in (None, [stored[1]]):
            made = CODEC.encode(clean, hints)
            assert torch.equal(bits(CODEC.decode(made)), bits(clean)), (what, hints is None)
        assert torch.equal(made[1].view(256, 256)[finite], scales[finite]), what
        values = (
            codes.view(torch.float8_e4m3fn).double() * 2.0 ** (scales.double() - 127)[..., None]
        )
        exact = values == clean.view(256, 256, 32)
        exact = exact.all(-1) & finite
        assert exact[3:].equal(finite[3:])
        assert exact.sum() > 0.9 * finite.sum()
        came = made[0].view(torch.uint8).view(256, 256, 32)
        assert torch.equal(came[exact], codes[exact]), what
        told += int(exact.sum())
    assert told > 150_000


def defined(block: list[Fraction]) -> tuple[int, list[int]]:
    """Scale and codes of a block: floor(log2(amax)) - 8, one more where amax would round past 448."""
    amax = max(map(abs, block))
    exponent = -126
    while Fraction(2) ** (exponent + 1) <= amax:
        exponent += 1
    scale = exponent - 8 + 127
    scale = max(0, scale + (amax / power(scale) > 464)) if amax else 118
    return scale, [nearest(abs(value) / power(scale)) for value in block]


def nearest(size: Fraction) -> int:
    """The code of the nearest magnitude; of two equally near the even code."""
    above = bisect.bisect_left(POSITIVE, size)
    near = [code for code in (above - 1, above) if 0 <= code < 127]
    return min(near, key=lambda code: (abs(POSITIVE[code] - size), code % 2))


def awkward(chance: random.Random) -> list[float]:
    """float32 values: near ties, near the step from one scale to the next, and plain ones."""
    base = 2.0 ** chance.choice([-149, -136, -133, -130, -127, -121, -30, 0, 30, 110, 119])
    tie = float((POSITIVE[60] + POSITIVE[61]) / 2)
    steps = [
        0.0,
        tie,
        1.0,
        1.75,
        463.9 / 256,
        464 / 256,
        464.1 / 256,
        1.875,
        1.99,
        2**-9,
        3 * 2**-10,
    ]
    block = [
        chance.choice([*steps, chance.random()]) * chance.choice([1, 2**-3, 2**-7, -1])
        for _ in range(32)
    ]
    return torch.tensor([value * base for value in block]).tolist()


def test_other_values_go_to_the_nearest() -> None:
    chance = random.Random(3)
    blocks = [awkward(chance) for _ in range(600)] + [[0.0] * 32]
    tensor = torch.tensor(blocks).view(1, -1, 1)
    elements, scales = CODEC.encode(tensor)
    signs = tensor.signbit().view(-1, 32)
    for index, block in enumerate(blocks):
        scale, codes = defined([Fraction(value) for value in block])
        assert scales[0, 0, index] == scale, block
        made = elements[0, 0, 32 * index : 32 * index + 32].view(torch.uint8)
        assert (made & 127).tolist() == codes, block
        assert ((made > 127) == signs[index]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_ends_of_the_range_stay_finite(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    tensor = torch.zeros(2, 64, 3, dtype=dtype)
    tensor[0, 0] = torch.tensor([top, -top, 1.9 * 2.0**127], dtype=dtype)
    tensor[1, 40] = torch.tensor([2.0**-133, -(2.0**-133), 5 * 2.0**-133], dtype=dtype)
    decoded = CODEC.decode(CODEC.encode(tensor))
    assert decoded[0, 0].tolist() == [mxfp8.LARGEST, -mxfp8.LARGEST, mxfp8.LARGEST]
    assert torch.equal(decoded[1].to(dtype), tensor[1])


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = distinct(TensorSpec((3, 64, 7, 2), "BF16"), 5)
    whole = CODEC.encode(tensor)
    decoded = CODEC.decode(whole)
    for size in (1, 300, 900):  # of 896 per expert
        monkeypatch.setattr(mxfp8, "PIECE", size)
        found = list(mxfp8.pieces(whole[0]))
        assert len(found) == {1: 42, 300: 12, 900: 3}[size]
        made = CODEC.encode(tensor, [whole[1].flip(0)])
        assert torch.equal(CODEC.decode(made), decoded)
        assert torch.equal(CODEC.decode(whole), decoded)


@pytest.mark.parametrize("shape", [(3, 64, 98), (2, 96, 6), (5, 32, 20), (3, 64, 64)])
def test_it_keeps_the_contract(shape: tuple[int, ...]) -> None:
    assert_codec(CODEC, TensorSpec(shape, "BF16"), tolerance=1 / 16)


# --- refused -------------------------------------------------------------------------------------


def test_what_it_is_not_for() -> None:
    with pytest.raises(ValueError, match=r"tensors \[E, in, out\], not \[64, 32\]"):
        mxfp8.parts(TensorSpec((64, 32), "BF16"))
    with pytest.raises(ValueError, match="32 inputs at a time, which does not divide 48"):
        mxfp8.parts(TensorSpec((2, 48, 64), "BF16"))
    elements, scales = mxfp8.parts(TensorSpec((2, 64, 6), "BF16"))
    assert (elements, scales) == (TensorSpec((2, 6, 64), "F8_E4M3"), TensorSpec((2, 6, 2), "U8"))
    for wrong in ((6, 64), (2, 6, 65), (2, 6, 96), (2, 6, 2, 32)):
        with pytest.raises(ValueError, match="are not"):
            mxfp8.spec([TensorSpec(wrong, "F8_E4M3"), scales])
    with pytest.raises(ValueError, match="F8_E5M2 and U8, not F8_E4M3 and U8"):
        mxfp8.spec([TensorSpec((2, 6, 64), "F8_E5M2"), scales])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_expert_that_holds_nan_is_named(bad: float) -> None:
    tensor = torch.zeros(4, 32, 5, dtype=torch.bfloat16)
    tensor[2, 31, 4] = bad
    with pytest.raises(EncodeError, match="holds NaN or infinity; mend the") as caught:
        CODEC.encode(tensor)
    assert caught.value.row == 2


# --- on checkpoints ------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def raw(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.fixture
def done(invoke: Any) -> Any:
    """Run a command that has to succeed."""

    def run(*words: object) -> str:
        found = invoke(*words)
        assert found.returncode == 0, found.stderr
        return str(found.stdout)

    return run


def test_quantized_as_declared(done: Any, originals: dict[str, Path], tmp_path: Path) -> None:
    done(
        "quantize", "--hf-model", originals["bf16"], "--hf-path", tmp_path / "q", "--codec", "mxfp8"
    )
    config = json.loads((tmp_path / "q/config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "mxfp8",
        "modules_to_not_convert": list(UNQUANTIZED),
    }
    before, after = stored(originals["bf16"]), stored(tmp_path / "q")
    experts = [name for name in before if name.endswith(EXPERTS)]
    assert len(experts) == 6
    for name in experts:
        weight = before.pop(name)
        elements, scales = after.pop(name + "_elements"), after.pop(name + "_scales")
        count, width, rows = weight.shape
        assert (elements.dtype, elements.shape) == (torch.float8_e4m3fn, (count, rows, width))
        assert (scales.dtype, scales.shape) == (torch.uint8, (count, rows, width // 32))
        blocks = weight.transpose(1, 2).double().unflatten(-1, (-1, 32))
        unit = 2.0 ** (scales.double() - 127)[..., None]
        error = (elements.double().view(blocks.shape) * unit - blocks).abs()
        assert (error <= blocks.abs() / 16 + unit * 2.0**-10).all()
        assert (error > 0).any()
    assert raw(after) == raw(before)


def test_there_and_back_byte_for_byte(
    done: Any, originals: dict[str, Path], tmp_path: Path
) -> None:
    """Import and export, dequantize and quantize; the stored scales are not those of the rule."""
    source = tmp_path / "q"
    done("quantize", "--hf-model", originals["bf16"], "--hf-path", source, "--codec", "mxfp8")
    noise = torch.Generator().manual_seed(4)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith("_scales")]:
            tensors[name] = torch.randint(3, 247, tensors[name].shape, generator=noise).byte()
            codes = (
                torch.arange(256).byte().repeat(tensors[name].numel() // 8)
            )  # many small elements
            codes[codes & 127 == 127] = 0x80
            mixed = codes[torch.randperm(len(codes), generator=noise)].view(-1, 32)
            mixed[::3] &= 0x87
            base = name.removesuffix("_scales") + "_elements"
            tensors[base] = mixed.view(tensors[base].shape).view(torch.float8_e4m3fn)
        save_file(tensors, file)
    want = raw(stored(source))
    done("import", "--hf-model", source, "--megatron-path", tmp_path / "mg")
    words = ("--export-dtype", "mxfp8")
    done("export", "--megatron-path", tmp_path / "mg", "--hf-path", tmp_path / "back", *words)
    assert raw(stored(tmp_path / "back")) == want
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    done("dequantize", "--hf-model", source, "--hf-path", tmp_path / "plain")
    again = ("quantize", "--hf-model", tmp_path / "plain", "--codec", "mxfp8")
    done(*again, "--hf-path", tmp_path / "same", "--scales-from", source)
    assert raw(stored(tmp_path / "same")) == want
    done(*again, "--hf-path", tmp_path / "ruled")
    ruled = stored(tmp_path / "ruled")
    assert raw(ruled) != want
    done("dequantize", "--hf-model", tmp_path / "ruled", "--hf-path", tmp_path / "values")
    assert raw(stored(tmp_path / "values")) == raw(stored(tmp_path / "plain"))


@pytest.mark.parametrize("form", ["mxfp4", "mxfp4-square"])
def test_mxfp4_goes_through_mxfp8_unchanged(
    done: Any, originals: dict[str, Path], tmp_path: Path, form: str
) -> None:
    mxfp4, eight = originals[form], tmp_path / "eight"
    said = done("quantize", "--hf-model", mxfp4, "--hf-path", eight, "--codec", "mxfp8")
    assert "nothing was lost" in said
    for source, target in ((mxfp4, "from_4"), (eight, "from_8")):
        done("import", "--hf-model", source, "--megatron-path", tmp_path / target)
    files = sorted(p.name for p in (tmp_path / "from_4/iter_0000000").glob("*.distcp"))
    assert files
    for name in files:
        one, other = (tmp_path / f"{f}/iter_0000000/{name}" for f in ("from_4", "from_8"))
        assert one.read_bytes() == other.read_bytes(), name
    back = ("quantize", "--hf-model", eight, "--codec", "mxfp4", "--hf-path")
    assert "nothing was lost" in done(*back, tmp_path / "four")
    done(*back, tmp_path / "four_bytes", "--scales-from", mxfp4)
    assert raw(stored(tmp_path / "four_bytes")) == raw(stored(mxfp4))
    values = []
    for source, target in ((mxfp4, "values_4"), (tmp_path / "four", "values_back")):
        done("dequantize", "--hf-model", source, "--hf-path", tmp_path / target)
        values.append(raw(stored(tmp_path / target)))
    assert values[0] == values[1]


def test_infinity_in_an_expert_stops_it(invoke: Any, hf: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    for file in hf.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 8, 5] = math.inf
            save_file(tensors, file)
    found = invoke("quantize", "--hf-model", hf, "--hf-path", tmp_path / "q", "--codec", "mxfp8")
    assert found.returncode == 1
    assert f"{name}[3]: holds NaN or infinity; mend the checkpoint" in found.stderr
    assert not (tmp_path / "q").exists()
