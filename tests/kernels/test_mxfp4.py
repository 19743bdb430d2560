"""The MXFP4 decoder against the OCP definition, over every scale byte and every code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_kernels import mxfp4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def defined(code: int, scale: int) -> float:
    """value = e2m1 * 2^(s - 127) in exact Python arithmetic; 255 is NaN."""
    if scale == 255:
        return float("nan")
    magnitude = E2M1[code & 7] * 2.0 ** (scale - 127)
    return -magnitude if code & 8 else magnitude


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


@pytest.fixture(scope="module")
def every_block() -> tuple[torch.Tensor, torch.Tensor]:
    """[256 scales, 256 bytes as one 16-byte block row each] and the scales."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 16)
    return blocks, scales


def test_every_scale_and_byte(every_block) -> None:
    blocks, scales = every_block
    got = mxfp4.decode(blocks, scales).view(256, 256, 2)
    want = torch.tensor(
        [[[defined(b & 15, s), defined(b >> 4, s)] for b in range(256)] for s in range(256)],
        dtype=torch.float64,
    ).to(torch.bfloat16)
    finite = ~want.isnan()
    assert torch.equal(bits(got)[finite], bits(want)[finite])
    assert torch.equal(got.isnan(), want.isnan())


def test_exact_below_overflow(every_block) -> None:
    """Rounding to bfloat16 loses nothing for any scale up to 252, subnormals included."""
    blocks, scales = every_block
    got = mxfp4.decode(blocks, scales).view(256, 512).double()[:253]
    want = [[defined(c, s) for b in range(256) for c in (b & 15, b >> 4)] for s in range(253)]
    assert torch.equal(got, torch.tensor(want, dtype=torch.float64))


def test_signed_zeros_keep_their_sign() -> None:
    blocks = torch.full((1, 16), 0x80, dtype=torch.uint8)  # low nibble +0, high nibble -0
    got = bits(mxfp4.decode(blocks, torch.tensor([120], dtype=torch.uint8)))
    assert got.tolist() == [0, -32768] * 16


def test_into_a_given_buffer_and_longer_than_a_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 2500, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 2500, 2), generator=generator, dtype=torch.uint8)
    out = torch.full((3 * 2500 * 64,), float("nan"), dtype=torch.bfloat16)
    got = mxfp4.decode(blocks, scales, out)
    assert got.shape == (3, 2500, 64)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(bits(got), bits(mxfp4.decode(blocks, scales)))
    for e, r, b, j in [(0, 0, 0, 0), (2, 2499, 1, 15), (1, 1365, 1, 7), (1, 1366, 0, 3)]:
        byte, scale = int(blocks[e, r, b, j]), int(scales[e, r, b])
        pair = got[e, r, b * 32 + 2 * j : b * 32 + 2 * j + 2].tolist()
        assert pair == [defined(byte & 15, scale), defined(byte >> 4, scale)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(0, 252))
def test_any_block(packed: list[int], scale: int) -> None:
    got = mxfp4.decode(
        torch.tensor([packed], dtype=torch.uint8), torch.tensor([scale], dtype=torch.uint8)
    )
    assert got.double().tolist() == [defined(c, scale) for b in packed for c in (b & 15, b >> 4)]
