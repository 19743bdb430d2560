"""Every MXFP4 backend against the OCP definition, in exact Python arithmetic, and against the others."""

from __future__ import annotations

import itertools
import math
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptoss_kernels import mxfp4
from gptoss_kernels.mxfp4 import Encoded, NonFiniteError, form
from gptoss_kernels.mxfp4.loss import loss

# The interpreter's numpy, where decoding overflows or makes NaN, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
BACKENDS = list(mxfp4.BACKENDS)
DEVICE = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}
DTYPES = [torch.bfloat16, torch.float32]
backends = pytest.mark.parametrize("backend", BACKENDS)
rules = pytest.mark.parametrize("rule", mxfp4.RULES)


def defined(code: int, scale: int) -> float:
    """value = e2m1 * 2^(s - 127) in exact Python arithmetic; 255 is NaN."""
    if scale == 255:
        return math.nan
    magnitude = E2M1[code & 7] * 2.0 ** (scale - 127)
    return -magnitude if code & 8 else magnitude


def nearest(value: float, scale: int) -> int:
    """The code by brute force: least distance, then the even one; the sign from the sign bit."""
    unit = Fraction(2) ** (scale - 127)
    distances = [abs(abs(Fraction(value)) / unit - Fraction(m)) for m in E2M1]
    code = min(range(8), key=lambda c: (distances[c], c % 2))
    return code | (8 if math.copysign(1, value) < 0 else 0)


def chosen(values: list[float], rule: str) -> int:
    """The scale byte a rule gives, from its definition; above 252 code 7 would be infinite."""
    most = max(abs(Fraction(v)) for v in values)
    if not most:
        return 0
    n = math.floor(math.log2(most))
    n += (most >= Fraction(2) ** (n + 1)) - (most < Fraction(2) ** n)  # log2 rounds
    m = most / Fraction(2) ** n
    up = {"even": m >= Fraction(7, 4), "floor": False, "round_up": m > Fraction(3, 2)}[rule]
    return min(max(n - 2 + up + 127, 0), 252)


def by_definition(values: list[float], rule: str, hint: int | None = None) -> tuple[list[int], int]:
    """Codes and scale of a finite block."""
    scale = chosen(values, rule)
    if hint not in (None, 255):
        codes = [nearest(v, hint) for v in values]
        unit = Fraction(2) ** (hint - 127)
        if all(
            Fraction(E2M1[c & 7]) * unit == abs(Fraction(v))
            for c, v in zip(codes, values, strict=True)
        ):
            return codes, hint
    return [nearest(v, scale) for v in values], scale


def unpack(block: Tensor) -> list[int]:
    return [c for byte in block.tolist() for c in (byte & 15, byte >> 4)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def same(a: Encoded, b: Encoded) -> bool:
    return torch.equal(a.blocks.cpu(), b.blocks.cpu()) and torch.equal(
        a.scales.cpu(), b.scales.cpu()
    )


def decode(blocks: Tensor, scales: Tensor, backend: str, **options) -> Tensor:
    device = DEVICE.get(backend, "cpu")
    return mxfp4.decode(blocks.to(device), scales.to(device), backend=backend, **options).cpu()


def encode(
    tensor: Tensor,
    backend: str,
    hint: Tensor | None = None,
    originals: Tensor | None = None,
    **options,
) -> Encoded:
    device = DEVICE.get(backend, "cpu")
    hint = None if hint is None else hint.to(device)
    if originals is not None:
        options["originals"] = lambda: originals.to(device)
    made = mxfp4.encode(tensor.to(device), hint=hint, backend=backend, **options)
    return Encoded(made.blocks.cpu(), made.scales.cpu())


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern: NaN, infinity and subnormals too."""
    raw = torch.randint(256, (*shape, dtype.itemsize), generator=noise(seed), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(*shape: int, low: int = 100, high: int = 140) -> Encoded:
    blocks = torch.randint(256, (*shape, 16), generator=noise(1), dtype=torch.uint8)
    return Encoded(blocks, torch.randint(low, high, shape, generator=noise(2), dtype=torch.uint8))


@pytest.fixture(scope="module")
def exhaustive() -> Encoded:
    """[8 largest codes, 256 scales, 1 block] with every code up to the largest, both signs.

    Quantizers see a block through its largest magnitude alone, and then element by element, so
    nothing is left that could behave in another way.
    """
    codes = torch.empty(8, 256, 1, 32, dtype=torch.uint8)
    for most in range(8):
        every = [c | sign for sign in (0, 8) for c in range(most + 1)]
        row = torch.tensor((every * 32)[:32], dtype=torch.uint8)
        for scale in range(256):
            codes[most, scale, 0] = row[torch.randperm(32, generator=noise(scale))]
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    scales = torch.arange(256, dtype=torch.uint8).repeat(8, 1)[..., None]
    return Encoded(blocks, scales)


# --- decoding ------------------------------------------------------------------------------------


@backends
def test_every_scale_and_byte(backend: str) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(256, 1, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).repeat(1, 16, 1)
    got = decode(blocks, scales, backend).view(256, 256, 2)
    want = torch.tensor(
        [[[defined(b & 15, s), defined(b >> 4, s)] for b in range(256)] for s in range(256)],
        dtype=torch.float64,
    )
    assert torch.equal(got[:253].double(), want[:253])  # nothing is rounded
    assert torch.equal(bits(got)[:255], bits(want.to(torch.bfloat16))[:255])  # signs of zeros too
    assert (bits(got)[255] == form.NAN_BITS).all()


@backends
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("deinterleave", [False, True])
def test_layouts_both_ways(backend: str, transpose: bool, deinterleave: bool) -> None:
    source = random_blocks(3, 70, 5)
    want = decode(*source, "reference")
    if deinterleave:
        want = torch.cat([want[:, 0::2], want[:, 1::2]], dim=1)
    if transpose:
        want = want.transpose(1, 2)
    got = decode(*source, backend, transpose=transpose, deinterleave=deinterleave)
    assert got.is_contiguous()
    assert torch.equal(bits(got), bits(want.contiguous()))
    again = encode(got, backend, source.scales, transpose=transpose, interleave=deinterleave)
    assert same(again, source)
    assert same(
        encode(want, backend, source.scales, transpose=transpose, interleave=deinterleave), source
    )


@backends
def test_a_range_of_experts_into_a_given_buffer(backend: str) -> None:
    blocks, scales = random_blocks(5, 38, 3)
    whole = decode(blocks, scales, backend, transpose=True)
    memory = torch.full((7, 96, 38), 3.0, dtype=torch.bfloat16, device=DEVICE.get(backend, "cpu"))
    out = memory[2:5]
    got = mxfp4.decode(
        blocks[1:4].to(out.device), scales[1:4].to(out.device), out, transpose=True, backend=backend
    )
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(bits(memory[2:5]), bits(whole[1:4]))
    assert (memory[:2] == 3).all()
    assert (memory[5:] == 3).all()


@pytest.mark.parametrize("backend", ["table", "numba"])
@pytest.mark.parametrize("transpose", [False, True])
def test_larger_than_a_chunk_and_on_several_threads(backend: str, transpose: bool) -> None:
    source = random_blocks(2, 3001, 30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(decode(*source, backend, transpose=transpose))
            assert same(encode(results[-1], backend, source.scales, transpose=transpose), source)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(results[0]), bits(results[1]))
    want = decode(*source, "reference", transpose=transpose)
    assert torch.equal(bits(results[0]), bits(want))


@backends
def test_several_callers_at_once(backend: str) -> None:
    rows, groups = (900, 30) if backend in ("table", "numba") else (20, 3)
    sources = [random_blocks(2, rows + n, groups) for n in range(4)]
    made: dict[int, Encoded] = {}

    def run(number: int) -> None:
        for _ in range(3):
            values = decode(*sources[number], backend)
            made[number] = encode(values, backend, sources[number].scales)

    callers = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(same(made[n], sources[n]) for n in range(4))


# --- encoding ------------------------------------------------------------------------------------


@backends
@rules
def test_what_was_mxfp4_comes_back(backend: str, rule: mxfp4.Rule, exhaustive: Encoded) -> None:
    values = decode(*exhaustive, backend)
    finite = values.isfinite().all(-1)
    assert int(finite.sum()) == 2034
    for dtype in DTYPES:
        plain = encode(values.to(dtype), backend, rule=rule, on_nonfinite="nan")
        assert torch.equal(bits(decode(*plain, backend))[finite], bits(values)[finite])
        hinted = encode(values.to(dtype), backend, exhaustive.scales, rule=rule, on_nonfinite="nan")
        assert torch.equal(hinted.blocks[finite], exhaustive.blocks[finite])
        assert torch.equal(hinted.scales[finite], exhaustive.scales[finite])
        assert (hinted.scales[~finite] == 255).all()
        assert (hinted.blocks[~finite] == 0).all()


@backends
@pytest.mark.parametrize("offset", [-128, -3, -2, -1, 1, 2, 3, 4, 100])
def test_a_wrong_hint_changes_no_value(backend: str, offset: int, exhaustive: Encoded) -> None:
    values = decode(*exhaustive, "reference")
    wrong = exhaustive.scales + torch.tensor(offset % 256, dtype=torch.uint8)
    made = encode(values, backend, wrong, on_nonfinite="nan")
    finite = values.isfinite().all(-1)
    assert torch.equal(bits(decode(*made, backend))[finite], bits(values)[finite])
    assert same(made, encode(values, "reference", wrong, on_nonfinite="nan"))


def huge(dtype: torch.dtype) -> list[Tensor]:
    """Blocks whose largest magnitude is near the end of the range, alone or among smaller ones."""
    most = [1.5, 1.5 + 2.0**-7, 1.75 - 2.0**-7, 1.75, torch.finfo(dtype).max * 2.0**-127]
    rows = []
    for m in most:
        among = torch.linspace(-0.7, 0.7, 32, dtype=torch.float64)
        among[3] = m
        alone = torch.zeros_like(among)
        alone[5] = -m
        rows += [(row * 2.0**127).to(dtype) for row in (among, alone)]
    return rows


@backends
@rules
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_becomes_infinite(
    backend: str, rule: mxfp4.Rule, dtype: torch.dtype
) -> None:
    x = torch.stack(huge(dtype))
    largest = 1.5 * 2.0**127
    assert x.isfinite().all()
    past = x.abs().double() >= largest
    for hint in (None, 252, 253, 254):
        given = None if hint is None else torch.full((len(x), 1), hint, dtype=torch.uint8)
        made = encode(x, backend, given, rule=rule)
        back = decode(*made, backend)
        assert back.isfinite().all(), hint
        assert (back[past].abs() == largest).all()
        assert same(made, encode(x, "reference", given, rule=rule))
    x[0, 7] = -math.inf
    saturated = decode(*encode(x, backend, rule=rule, on_nonfinite="saturate"), backend)
    assert saturated.isfinite().all()
    assert saturated[0, 7] == -largest


@rules
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_does_what_the_definition_says(rule: mxfp4.Rule, dtype: torch.dtype) -> None:
    halves = torch.arange(0, 32) * 0.25  # every code, every tie, and beyond the largest
    rows = [
        torch.randn(32, generator=noise(1)),
        torch.randn(32, generator=noise(2)) * 2.0**-127,
        torch.randn(32, generator=noise(3)) * 2.0**126 / 4,
        halves,
        -halves,
        halves * (1 + 2.0**-7),
        halves * (1 + 2.0**-23),
        halves * 2.0**-126,
        torch.tensor([0.0, -0.0] * 16),
        random_bits((32,), dtype, 4).nan_to_num(1.0, 2.0, 3.0).float(),
    ]
    tries = [(row, hint) for row in rows for hint in (None, 127, 0, 130, 255)]
    tries += [(row, hint) for row in huge(dtype) for hint in (None, 252, 253, 254)]
    for row, hint in tries:
        x = row.to(dtype)
        given = None if hint is None else torch.tensor([[hint]], dtype=torch.uint8)
        made = encode(x[None], "reference", given, rule=rule)
        codes, scale = by_definition(x.double().tolist(), rule, hint)
        assert int(made.scales) == scale
        assert unpack(made.blocks[0, 0]) == codes


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@rules
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_make_the_same_bytes(backend: str, rule: mxfp4.Rule, dtype: torch.dtype) -> None:
    size = (90, 64)
    normal = torch.randn(size, generator=noise(5))
    inputs = [
        random_bits(size, dtype),
        random_bits(size, dtype, 1).nan_to_num(1.0, 2.0, 3.0),
        normal.to(dtype),
        (normal * 2.0**-126).to(dtype),
        (normal * 2.0**-140).to(dtype),
        (normal.sign() * 2.0 ** torch.randint(-3, 3, size, generator=noise(6))).to(dtype),
        (torch.randint(-28, 29, size, generator=noise(7)) / 4 * (1 + 2.0**-23)).to(dtype),
        (normal.clamp(-3, 3) * 2.0**126).to(dtype),
    ]
    any_hint = torch.randint(256, (90, 2), generator=noise(8), dtype=torch.uint8)
    near = torch.randint(120, 131, (90, 2), generator=noise(9), dtype=torch.uint8)
    last = torch.randint(250, 256, (90, 2), generator=noise(9), dtype=torch.uint8)
    for x, hint in itertools.product(inputs, (None, any_hint, near, last)):
        want = encode(x, "reference", hint, rule=rule, on_nonfinite="nan")
        assert same(encode(x, backend, hint, rule=rule, on_nonfinite="nan"), want)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(0, 252))
def test_any_block_survives(backend: str, packed: list[int], scale: int) -> None:
    source = Encoded(
        torch.tensor([[packed]], dtype=torch.uint8), torch.tensor([[scale]], dtype=torch.uint8)
    )
    values = decode(*source, backend)
    assert values[0].tolist() == [defined(c, scale) for c in unpack(source.blocks[0, 0])]
    assert same(encode(values, backend, source.scales), source)


@backends
def test_zeros_keep_their_signs_and_their_scale(backend: str) -> None:
    x = torch.tensor([[0.0, -0.0] * 16, [-0.0] * 32], dtype=torch.bfloat16)
    made = encode(x, backend)
    assert made.scales.tolist() == [[0], [0]]
    assert made.blocks.unique(dim=2).tolist() == [[[0x80]], [[0x88]]]
    kept = encode(x, backend, torch.tensor([[77], [255]], dtype=torch.uint8))
    assert kept.scales.tolist() == [[77], [0]]  # 255 would make it NaN
    assert torch.equal(kept.blocks, made.blocks)


@backends
def test_nan_and_infinity(backend: str) -> None:
    x = torch.randn(3, 6, 96, generator=noise(1))
    x[1, 4, 70], x[2, 0, 1] = math.inf, -math.inf
    with pytest.raises(NonFiniteError, match=r"\[1, 4, 2\] .* \(2 such blocks in all\)") as caught:
        encode(x, backend)
    assert caught.value.block == (1, 4, 2)
    broken = encode(x, backend, on_nonfinite="nan")
    assert (broken.scales == 255).nonzero().tolist() == [[1, 4, 2], [2, 0, 0]]
    values = decode(*broken, backend)
    assert int(values.isnan().sum()) == 64
    full = decode(*encode(x, backend, on_nonfinite="saturate"), backend)
    assert full[1, 4, 70] == 1.5 * 2.0**127
    assert full[2, 0, 1] == -1.5 * 2.0**127
    x[0, 5, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"\[0, 5, 0\] .* \(1 such"):
        encode(x, backend, on_nonfinite="saturate")


@pytest.mark.parametrize("transpose", [False, True])
def test_saturation_finds_its_blocks_in_any_layout(transpose: bool) -> None:
    x = torch.randn(2, 6, 64, generator=noise(1)).bfloat16()
    x[1, 4, 40] = math.inf
    given = x.transpose(1, 2).contiguous() if transpose else x
    made = mxfp4.encode(given, transpose=transpose, interleave=True, on_nonfinite="saturate")
    rows = decode(*made, "table")  # gate row 1 is stored as row 2, up row 1 as row 3
    assert rows[1, 3, 40] == 1.5 * 2.0**127
    assert rows.isfinite().all()
    assert (rows.abs() > 100).sum() == 1


@backends
def test_out_is_written_and_strides_do_not_matter(backend: str) -> None:
    device = DEVICE.get(backend, "cpu")
    wide = torch.randn(4, 7, 200, generator=noise(3)).bfloat16().to(device)
    x = wide[:, 1:6, 5:101]  # odd strides and an odd start
    out = Encoded(
        torch.full((4, 5, 3, 16), 7, dtype=torch.uint8, device=device),
        torch.full((4, 5, 3), 7, dtype=torch.uint8, device=device),
    )
    made = mxfp4.encode(x, out=out, backend=backend)
    assert made.blocks.data_ptr() == out.blocks.data_ptr()
    assert same(made, encode(x.cpu().contiguous(), "reference"))


def test_float16_is_taken_exactly() -> None:
    x = torch.randn(5, 64, generator=noise(4)).half()
    assert same(encode(x, "table"), encode(x.float(), "reference"))


# --- what is refused -----------------------------------------------------------------------------


def test_bad_arguments() -> None:
    blocks, scales = random_blocks(2, 5, 3)
    with pytest.raises(ValueError, match="odd number of rows, 5"):
        mxfp4.decode(blocks, scales, deinterleave=True)
    with pytest.raises(ValueError, match=r"\[2, 5, 3, 16\] and scales \[2, 5\]"):
        mxfp4.decode(blocks, scales[..., 0])
    with pytest.raises(ValueError, match="must be uint8"):
        mxfp4.decode(blocks.short(), scales)
    with pytest.raises(ValueError, match="with 960 elements"):
        mxfp4.decode(blocks, scales, torch.empty(959, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="no MXFP4 backend 'fast'; choose auto, triton"):
        mxfp4.decode(blocks, scales, backend="fast")
    assert mxfp4.decode(blocks, scales, backend="auto").equal(mxfp4.decode(blocks, scales))
    x = torch.randn(2, 48)
    with pytest.raises(ValueError, match="32 do not divide rows of 48"):
        mxfp4.encode(x)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        mxfp4.encode(x.double())
    with pytest.raises(ValueError, match="no scale rule 'ceil'; choose even, floor, round_up"):
        mxfp4.encode(x[:, :32], rule="ceil")
    with pytest.raises(ValueError, match=r"must be \[2, 1\]"):
        mxfp4.encode(x[:, :32], hint=torch.zeros(2, dtype=torch.uint8))


def test_a_backend_that_does_not_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = random_blocks(1, 2, 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        mxfp4.decode(blocks, scales, backend="triton")
    assert mxfp4.choose(torch.device("cpu")).__name__.endswith((".numba", ".table"))


def test_nothing_in_is_nothing_out() -> None:
    empty = torch.empty(0, 4, 64, dtype=torch.bfloat16)
    made = mxfp4.encode(empty)
    assert made.blocks.shape == (0, 4, 2, 16)
    assert mxfp4.decode(*made).shape == empty.shape


# --- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_what_float64_says(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, 64, generator=noise(6)).to(dtype)
    x[1] = decode(*encode(x[1], "table"), "table").to(dtype)
    made = encode(x, "table")
    found = loss(x, *made)
    error = decode(*made, "reference").double() - x.double()
    assert found.blocks == 300
    assert found.kept == int((error.view(300, 32) == 0).all(1).sum()) >= 100
    assert found.largest == pytest.approx(float(error.abs().max()))
    assert found.squares == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert found.power == pytest.approx(float(x.double().square().sum()), rel=1e-5)
    assert found.elements == x.numel()


def test_the_loss_of_values_out_of_the_ordinary() -> None:
    """A NaN takes the finite values of its block with it: they are lost to their full size."""
    x = torch.randn(2, 3, 32, generator=noise(6))
    x[0, 1, 4], x[1, 0, 0], x[1, 2] = math.nan, 1e30, -math.inf
    made = encode(x, "table", on_nonfinite="nan")
    found = loss(x, *made)
    value = x.double()[x.isfinite()]
    error = decode(*made, "reference").double().nan_to_num(0)[x.isfinite()] - value
    assert found.kept == 0
    assert found.nonfinite == 33
    assert found.elements == x.numel()
    assert found.largest == pytest.approx(float(error.abs().max()))
    assert found.squares == pytest.approx(float(error.square().sum()))
    assert found.power == pytest.approx(float(value.square().sum()))
    assert found.power > 9e59
    alone = torch.randn(1, 32, generator=noise(6))
    alone[0, 3] = math.nan
    lost = loss(alone, *encode(alone, "table", on_nonfinite="nan"))
    assert lost.squares == lost.power > 0
    nothing = torch.full((2, 64), math.inf)
    for policy in ("nan", "saturate"):
        only = loss(nothing, *encode(nothing, "table", on_nonfinite=policy))
        assert (only.blocks, only.kept, only.nonfinite) == (4, 0, 128)
        assert (only.largest, only.squares, only.power) == (0, 0, 0)


def test_the_loss_of_what_is_cut_down() -> None:
    x = torch.full((3, 32), 3e38, dtype=torch.bfloat16)
    found = loss(x, *encode(x, "table"))
    error = float(x[0, 0]) - 1.5 * 2.0**127
    assert (found.kept, found.nonfinite) == (0, 0)
    assert found.largest == pytest.approx(error)
    assert found.squares == pytest.approx(96 * error**2)


@pytest.mark.parametrize("policy", ["error", "saturate"])
def test_what_is_refused_is_named(policy: mxfp4.OnNonFinite) -> None:
    x = torch.zeros(3, 64)
    x[1, 33] = math.inf
    if policy == "error":
        with pytest.raises(NonFiniteError, match=r"\[1, 1\] holds infinity \(1 such") as caught:
            encode(x, "table", on_nonfinite=policy)
        assert not caught.value.any_nan
    x[2, 0], x[2, 1] = math.nan, -math.inf
    place, count = ((1, 1), 2) if policy == "error" else ((2, 0), 1)
    with pytest.raises(NonFiniteError) as caught:
        encode(x, "table", on_nonfinite=policy)
    assert (caught.value.block, caught.value.count) == (place, count)
    assert caught.value.any_nan
    assert caught.value.holds == ("infinity" if policy == "error" else "NaN and infinity")


@backends
def test_what_decodes_to_no_finite_value_is_counted(backend: str, exhaustive: Encoded) -> None:
    values = decode(*exhaustive, backend)
    infinite, nan, where = mxfp4.spoiled(*exhaustive)
    assert (infinite, nan) == (int(values.isinf().sum()), int(values.isnan().sum()))
    broken = ~values.unflatten(-1, (-1, 32)).isfinite().all(-1)
    assert broken.any()
    assert torch.equal(where, broken.view(where.shape))
    assert mxfp4.spoiled(exhaustive.blocks[:, :253], exhaustive.scales[:, :253]) is None
    empty = torch.empty(0, 16, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    assert mxfp4.spoiled(*empty) is None


@backends
@pytest.mark.parametrize("policy", ["error", "nan", "saturate"])
def test_blocks_that_are_not_finite_are_put_back(
    backend: str, policy: mxfp4.OnNonFinite, exhaustive: Encoded
) -> None:
    """With the source's scales and blocks everything comes back, whatever was to become of it."""
    values, (blocks, scales) = decode(*exhaustive, backend), exhaustive
    where = mxfp4.spoiled(blocks, scales)[2]
    kept = torch.where(where[..., None], blocks, 0)
    for wide in (values, values.float()):
        made = encode(wide, backend, scales, kept, on_nonfinite=policy)
        assert torch.equal(made.blocks, blocks)
        assert torch.equal(made.scales, scales)


@backends
def test_blocks_that_changed_are_not_put_back(backend: str, exhaustive: Encoded) -> None:
    blocks, scales = (part.reshape(-1, *part.shape[2:]) for part in exhaustive)
    (found,) = torch.where(mxfp4.spoiled(blocks, scales)[2].view(-1))
    blocks, scales = blocks.view(-1, 16)[found][None], scales.view(-1)[found][None]
    values = decode(blocks, scales, backend).clone()
    infinite = scales.view(-1) < 255
    changed = values.view(-1, 32)
    changed[infinite] = -changed[infinite]  # the other infinity
    changed[~infinite, 0] = 1.0  # no longer all NaN
    made = encode(values, backend, scales, blocks, on_nonfinite="nan")
    want = encode(values, backend, scales, on_nonfinite="nan")
    assert torch.equal(made.blocks, want.blocks)
    assert torch.equal(made.scales, want.scales)
    assert bool((made.scales == 255).all())
    with pytest.raises(NonFiniteError):
        encode(values, backend, scales, blocks)


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("transpose", [False, True])
def test_more_than_two_to_the_31_elements(transpose: bool) -> None:
    """The gate/up projections of one 120B layer."""
    experts, rows, groups = 130, 5760, 90
    blocks = torch.randint(256, (experts, rows, groups, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(90, 140, (experts, rows, groups), dtype=torch.uint8, device="cuda")
    values = mxfp4.decode(blocks, scales, transpose=transpose, deinterleave=True)
    assert values.numel() > 2**31
    for expert in (0, 1, 64, 128, 129):
        want = decode(
            blocks[expert : expert + 1].cpu(),
            scales[expert : expert + 1].cpu(),
            "table",
            transpose=transpose,
            deinterleave=True,
        )
        assert torch.equal(bits(values[expert : expert + 1]), bits(want))
    made = mxfp4.encode(values, hint=scales, transpose=transpose, interleave=True)
    assert torch.equal(made.blocks, blocks)
    assert torch.equal(made.scales, scales)
