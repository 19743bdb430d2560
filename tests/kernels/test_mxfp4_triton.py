"""What is Triton's own: tiles and their edges, strides and addresses; on a GPU, real sizes.

What every backend has to do is in ``test_mxfp4.py``. Here the reference is the measure.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from gptoss_kernels import mxfp4
from gptoss_kernels.mxfp4 import Encoded, reference
from gptoss_kernels.mxfp4 import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
LAYOUTS = list(itertools.product([False, True], repeat=2))
layouts = pytest.mark.parametrize(("transpose", "interleave"), LAYOUTS)
# The interpreter's float32 is numpy's, which warns where it multiplies zero by infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(*shape: int) -> Encoded:
    """All codes, and every scale."""
    blocks = torch.randint(256, (*shape, 16), generator=noise(1), dtype=torch.uint8)
    return Encoded(blocks, torch.randint(256, shape, generator=noise(2), dtype=torch.uint8))


def random_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mixture: on the grid, off it, around the ties, very small, and a few not finite."""
    plain = torch.randn(shape, generator=noise(3))
    grid = torch.randint(-12, 13, shape, generator=noise(4)) / 2
    ties = torch.randint(-24, 25, shape, generator=noise(5)) / 4 * (1 + 2.0**-23)
    raw = torch.randint(2**16, shape, generator=noise(6)).to(torch.int16).view(torch.bfloat16)
    kinds = torch.stack([plain, grid, ties, plain * 2.0**-127, raw.float()]).to(dtype)
    blocks = torch.randint(5, (*shape[:-1], shape[-1] // 32), generator=noise(7))
    return kinds.gather(0, blocks.repeat_interleave(32, -1)[None])[0]


def memory(view: Tensor) -> Encoded:
    """Room for the blocks of a ``[E, A, B, K]`` view; no byte is what it will be."""
    experts, outer, inner, width = view.shape
    shape = (experts, outer * inner, width // 32)
    return Encoded(
        torch.full((*shape, 16), 0xA7, dtype=torch.uint8, device=view.device),
        torch.full(shape, 0xA7, dtype=torch.uint8, device=view.device),
    )


def by_reference(view: Tensor, rule: mxfp4.Rule, hint: Tensor | None) -> Encoded:
    made = memory(view.cpu())
    reference.encode(view.cpu(), rule, None if hint is None else hint.cpu(), *made)
    return made


def check(made: Encoded, want: Encoded) -> None:
    assert torch.equal(made.scales.cpu(), want.scales)
    assert torch.equal(made.blocks.cpu(), want.blocks)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.int16)


def check_layout(source: Encoded, *, transpose: bool, interleave: bool) -> None:
    """Both ways, bits and bytes, hinted and not."""
    there = Encoded(*(part.to(DEVICE) for part in source))
    how = {"transpose": transpose, "deinterleave": interleave}
    got = mxfp4.decode(*there, backend="triton", **how)
    assert torch.equal(bits(got), bits(mxfp4.decode(*source, backend="reference", **how)))
    how = {"transpose": transpose, "interleave": interleave, "on_nonfinite": "nan"}
    for hint, dtype in ((None, torch.bfloat16), (0, torch.bfloat16), (1, torch.float32)):
        wanted = None if hint is None else source.scales + hint
        want = mxfp4.encode(got.cpu().to(dtype), hint=wanted, backend="reference", **how)
        given = None if wanted is None else wanted.to(DEVICE)
        check(mxfp4.encode(got.to(dtype), hint=given, backend="triton", **how), want)


@layouts
@pytest.mark.parametrize("shape", [(2, 134, 5), (134, 3)])  # one more row than two tiles; no E
def test_layouts(shape: tuple[int, ...], transpose: bool, interleave: bool) -> None:
    check_layout(random_blocks(*shape), transpose=transpose, interleave=interleave)


# name -> [E, A, B, K] view of flat memory, as the strides of its sizes (3, 5, 2, 96)
STRIDES = {
    "contiguous": (960, 192, 96, 1),
    "gaps of an odd size": (1111, 201, 99, 1),
    "gaps of an even size": (1112, 202, 100, 1),
    "experts last": (1, 3, 1440, 15),
    "B first": (960, 2, 1, 10),
    "K in steps": (2000, 390, 195, 2),
    "nothing in order": (97, 31000, 3001, 311),
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("start", [0, 1])
def test_any_strides_and_any_start(name: str, start: int) -> None:
    size, strides = (3, 5, 2, 96), STRIDES[name]
    span = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    source = random_blocks(3, 10, 3)
    flat = torch.full((span + 40,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    view = flat[start:].as_strided(size, strides, 10 + start)
    there = tuple(part.to(DEVICE) for part in source)
    kernels.decode(*there, view)
    want = torch.full((span + 40,), 7.0, dtype=torch.bfloat16)
    reference.decode(*source, want.as_strided(size, strides, 10 + start))
    assert torch.equal(bits(flat), bits(want))  # what lies between is not touched
    for dtype in (torch.bfloat16, torch.float32):
        values = flat.to(dtype)
        values.as_strided(size, strides, 10 + start).copy_(random_values(size, dtype))
        view = values.as_strided(size, strides, 10 + start)
        made = memory(view)
        kernels.encode(view, "even", there[1], *made)
        check(made, by_reference(view, "even", there[1]))


def test_blocks_at_an_odd_address() -> None:
    source = random_blocks(1, 3, 2)
    room = torch.zeros(97, dtype=torch.uint8, device=DEVICE)
    blocks = room[1:].view(1, 3, 2, 16)
    blocks.copy_(source.blocks)
    view = torch.empty(1, 3, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    kernels.decode(blocks, source.scales.to(DEVICE), view)
    want = torch.empty(1, 3, 1, 64, dtype=torch.bfloat16)
    reference.decode(*source, want)
    assert torch.equal(bits(view), bits(want))
    blocks.zero_()
    scales = torch.empty_like(source.scales, device=DEVICE)
    kernels.encode(view, "even", None, blocks, scales)
    check(Encoded(blocks, scales), by_reference(view, "even", None))
    assert room[0] == 0


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixed_values(rule: mxfp4.Rule, dtype: torch.dtype) -> None:
    """Programs in which some hints agree, some can be taken, and some cannot."""
    x = random_values((1, 331, 1, 96), dtype)
    best = by_reference(x, rule, None).scales
    for spread in (1, 2, 5):
        away = torch.randint(spread, best.shape, generator=noise(8), dtype=torch.uint8)
        made = memory(x.to(DEVICE))
        kernels.encode(x.to(DEVICE), rule, (best + away).to(DEVICE), *made)
        check(made, by_reference(x, rule, best + away))


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transpose", "interleave"), [pytest.param(*layout, marks=GPU) for layout in LAYOUTS]
)
@pytest.mark.parametrize("shape", [(2, 722, 90), (1, 2880, 45)])
def test_real_sizes(shape: tuple[int, ...], transpose: bool, interleave: bool) -> None:
    check_layout(random_blocks(*shape), transpose=transpose, interleave=interleave)


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=GPU) for rule in mxfp4.RULES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_values(rule: mxfp4.Rule, dtype: torch.dtype) -> None:
    raw = torch.randint(
        256, (2, 2001, 1, 96, dtype.itemsize), generator=noise(9), dtype=torch.uint8
    )
    hints = torch.randint(110, 140, (2, 2001, 3), generator=noise(10), dtype=torch.uint8)
    scaled = torch.randn(2, 2001, 1, 96, generator=noise(11)).to(dtype)
    for x in (
        raw.view(dtype)[..., 0],
        scaled,
        scaled * 2.0**-126,
        random_values(scaled.shape, dtype),
    ):
        for hint in (None, hints):
            made = memory(x.to(DEVICE))
            kernels.encode(x.to(DEVICE), rule, None if hint is None else hint.to(DEVICE), *made)
            check(made, by_reference(x, rule, hint))


@pytest.mark.parametrize("turned", [pytest.param(value, marks=GPU) for value in (False, True)])
def test_more_elements_than_31_bits_count(turned: bool) -> None:
    """A layer of the 120B model, and two experts more, as its 128 are just below."""
    shape, generator = (130, 5760, 90), torch.Generator(DEVICE).manual_seed(0)
    bytes_on = {"dtype": torch.uint8, "device": DEVICE, "generator": generator}
    blocks = torch.randint(256, (*shape, 16), **bytes_on)
    scales = torch.randint(90, 160, shape, **bytes_on)
    values = mxfp4.decode(blocks, scales, transpose=turned, deinterleave=turned, backend="triton")
    assert values.numel() > 2**31
    for expert in (0, 64, 128, 129):
        packed = blocks[expert].cpu(), scales[expert].cpu()
        want = mxfp4.decode(*packed, transpose=turned, deinterleave=turned, backend="reference")
        assert torch.equal(bits(values[expert]), bits(want))
    how = {"transpose": turned, "interleave": turned, "on_nonfinite": "nan", "backend": "triton"}
    made = mxfp4.encode(values, hint=scales, **how)
    assert torch.equal(made.scales, scales)
    assert torch.equal(made.blocks, blocks)
