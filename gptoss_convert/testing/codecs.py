"""The contract of a codec, tried on tensors that show every way of breaking it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import itemsize
from gptoss_convert.encoding import bind
from gptoss_convert.errors import EncodeError, UsageError
from gptoss_convert.testing.families import distinct
from gptoss_convert.testing.tried import Tried, same

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.types import Codec, Config, TensorSpec


def assert_codec(
    codec: Codec,
    logical: TensorSpec,
    *,
    tolerance: float = 0.25,
    signed_zeros: bool = True,
    refuses_nonfinite: bool = True,
    any_bytes: Sequence[str] | None = None,
    nan_bytes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """A codec keeps, both ways, the contract of :class:`~gptoss_convert.types.Codec`.

    What it cannot see is an encoder and a decoder that are wrong in the same way: compare decoded
    bytes with the definition of your format once.

    Args:
        codec: one that writes.
        logical: a tensor it can store, of two rows or more. Choose sizes that are all different
            (a transposed square matrix still has the right shape), the last of them not prime.
        tolerance: the largest error allowed, as a share of the largest magnitude of the row of
            dim 0 (of the tensor, if the codec is not sliceable).
        signed_zeros: whether -0.0 comes back as -0.0.
        refuses_nonfinite: whether NaN and infinity raise EncodeError.
        any_bytes: suffixes of the parts in which any byte may stand; by default those whose
            elements are one byte wide. Every finite value that such bytes decode to must be kept.
            Give () if your encoder holds itself to fewer.
        nan_bytes: by suffix, bytes that stand for NaN: a part filled with one decodes to nothing
            else, whatever is in the others.

    Raises:
        AssertionError: naming the codec and what is wrong.

    """
    it = Tried(codec, logical, signed_zeros)
    _try_declaring(it)
    _try_specs(it)
    values = _values(logical, apart=codec.sliceable)
    parts = it.encode(values, "distinct values")
    kept = it.decode(parts, "the parts it made")
    _try_errors(it, values, kept, tolerance)
    it.require_kept(kept, "what it decoded itself")
    it.require_parts(parts, values.float(), "the same values in float32")
    half = values.half()
    it.require_parts(it.encode(half.float(), "values of float16"), half, "them in float16")
    _try_float32(it, values)
    for what, view in _views(values):
        it.require_parts(parts, view, what)
    if codec.sliceable:
        _try_slices(it, values, parts, kept)
    _try_zeros(it, values)
    _try_largest(it, values)
    if refuses_nonfinite:
        _try_nonfinite(it, values)
    anywhere = _places(it, any_bytes)
    _try_bytes(it, parts, anywhere)
    _try_nan_bytes(it, parts, nan_bytes or {})
    if codec.spoiled:
        _try_spoiled(it, parts, anywhere)
    if codec.hints:
        _try_hints(it, parts, anywhere)
        _try_wrong_hints(it, parts, (values, kept))
    _try_options(it, kept)
    _try_measuring(it, values, parts, kept)


def _try_declaring(it: Tried) -> None:
    """What it declares survives JSON and is its own; nothing else is."""
    codec = it.codec
    it.require(codec.writes, "cannot write: it lacks encode, parts or declare")
    it.require(set(codec.hints) <= set(codec.suffixes), "has hints that are none of its parts")
    assert codec.declare
    modules = ["lm_head", "model.layers.*.self_attn"]
    declared = codec.declare(modules)
    stored = json.loads(json.dumps(declared))
    it.require(stored == dict(declared), "declares what JSON cannot hold")
    told = json.dumps(stored)
    it.require(all(m in told for m in modules), "declares no modules that are to stay unquantized")
    own = codec.matches({"quantization_config": stored})
    it.require(bool(own), "does not match the config that it declares")
    foreign = {"quantization_config": {"quant_method": f"not-{codec.name}"}}
    others: list[Config] = [{}, {"quantization_config": None}, {"quantization_config": {}}, foreign]
    for config in others:
        it.require(not codec.matches(config), f"matches {config}, which does not declare it")


def _try_specs(it: Tried) -> None:
    """``parts`` and ``spec`` are inverse, and ``spec`` refuses parts that do not belong together."""
    codec, logical, parts = it.codec, it.logical, list(it.promised())
    it.require(len(parts) == len(codec.suffixes), "promises more or fewer parts than suffixes")
    try:
        back: TensorSpec | str = codec.spec(parts)
    except ValueError as error:
        back = f"an error ({error})"
    it.require(back == logical, f"has a spec that makes {back} of the parts of {logical}")
    rows = {part.shape[:1] for part in parts} == {logical.shape[:1]}
    it.require(rows or not codec.sliceable, "is sliceable, but dim 0 of a part is not that of all")
    for index, part in enumerate(parts):
        larger = (
            replace(part, shape=(*part.shape[:dim], size + 1, *part.shape[dim + 1 :]))
            for dim, size in enumerate(part.shape)
        )
        for other in (replace(part, dtype="BOOL"), *larger):
            wrong = [*parts[:index], other, *parts[index + 1 :]]
            text = f"takes {', '.join(map(str, wrong))} for parts of one tensor"
            it.require(not _fit_together(codec, wrong), text)


def _fit_together(codec: Codec, parts: Sequence[TensorSpec]) -> bool | None:
    """Whether ``spec`` takes parts; None if they are indeed those of some other tensor."""
    assert codec.parts
    try:
        logical = codec.spec(parts)
        return None if list(codec.parts(logical)) == list(parts) else True
    except ValueError:
        return False


def _values(logical: TensorSpec, *, apart: bool) -> Tensor:
    """Distinct values; if ``apart``, rows whose magnitudes have nothing to do with each other."""
    import torch

    values = distinct(logical, 1)
    if apart:
        powers = 4.0 ** (torch.arange(len(values)) % 5)
        values *= powers.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return values


def _try_errors(it: Tried, values: Tensor, kept: Tensor, tolerance: float) -> None:
    rows = len(values) if it.codec.sliceable else 1
    differences = kept.double() - values.double()
    error, size = (t.abs().reshape(rows, -1).amax(1) for t in (differences, values.double()))
    worst = float((error / size).max())
    text = f"is off by {worst:.2g} of the largest magnitude; a tolerance of {tolerance} is allowed"
    it.require(worst <= tolerance, text)


def _try_float32(it: Tried, values: Tensor) -> None:
    """A float32 is not rounded to bfloat16 first: that would hide on which side of a middle it is.

    Near enough to a value of bfloat16 both sides become that value; among so many values some are
    in the middle between two that the codec can hold, where the sides must part.
    """
    middles = values.bfloat16().float()
    sides = [it.encode(middles * (1 + side * 2.0**-10), "float32") for side in (-1, 1)]
    it.require(not all(map(same, *sides)), "rounds float32 to bfloat16 before it encodes")


def _views(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same row-major order in other memory, and in more dims behind the first ones."""
    import torch

    dims = range(values.dim())
    for order in itertools.permutations(dims):
        back = sorted(dims, key=order.__getitem__)
        yield (
            f"a view with dims in the order {order}",
            values.permute(order).clone(memory_format=torch.contiguous_format).permute(back),
        )
    sparse = torch.full([2 * size for size in values.shape], math.nan, dtype=values.dtype)
    every_other = sparse[tuple(slice(1, None, 2) for _ in dims)]
    yield "a view of every other element", every_other.copy_(values)
    width = values.shape[-1]
    factor = next((n for n in range(2, width) if width % n == 0), 1)
    split = values.unflatten(-1, (-1, factor))
    yield "a view with its last dim in two", split
    turned = split.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "a view with its last dim in two, the inner one outside in memory", turned


def _try_slices(it: Tried, values: Tensor, parts: Sequence[Tensor], kept: Tensor) -> None:
    """Rows by themselves give what they give in the whole."""
    count = len(values)
    it.require(count > 1, "is tried on a single row; choose a tensor of two or more")
    for rows in (slice(0, 1), slice(1, count), slice(count - 1, count)):
        what = f"rows {rows.start} to {rows.stop} by themselves"
        some = [part[rows] for part in parts]
        it.require_parts(some, values[rows], what)
        it.require(same(it.decode(some, what), kept[rows]), f"decodes {what} differently")


def _try_zeros(it: Tried, values: Tensor) -> None:
    """Zeros of both signs, scattered, and rows of nothing else."""
    zeros = values.clone().contiguous()
    flat = zeros.view(-1)
    flat[::3], flat[1::3] = 0.0, -0.0
    zeros[0], zeros[-1] = 0.0, -0.0
    back = it.decode(it.encode(zeros, "zeros"), "zeros")
    here = zeros == 0
    it.require(bool((back[here] == 0).all()), "makes something of zeros")
    if it.signed_zeros:
        signs = (back.signbit() == zeros.signbit())[here]
        it.require(bool(signs.all()), "loses the sign of zeros")


def _try_largest(it: Tried, values: Tensor) -> None:
    """The largest finite values are refused, or stay finite."""
    import torch

    assert it.codec.encode
    tensor = values.clone().contiguous()
    most = torch.finfo(tensor.dtype).max
    tensor.view(-1)[::5], tensor.view(-1)[3::7] = most, -0.9 * most
    try:
        parts = it.codec.encode(tensor, None, None)
    except EncodeError:
        return
    finite = it.codec.decode(parts).isfinite()
    it.require(bool(finite.all()), "makes infinity or NaN of finite values")


def _try_nonfinite(it: Tried, values: Tensor) -> None:
    """NaN and infinity stop it, and it says in which row."""
    assert it.codec.encode
    last = len(values) - 1
    for bad in (math.nan, math.inf, -math.inf):
        tensor = values.clone()
        tensor[(last, *(size // 2 for size in values.shape[1:]))] = bad
        try:
            it.codec.encode(tensor, None, None)
        except EncodeError as error:
            text = f"says that row {error.row} holds {bad}, when it is row {last}"
            it.require(error.row == last or not it.codec.sliceable, text)
            one_line = len(str(error).splitlines()) == 1
            it.require(one_line, f"should say in one sentence what is wrong with {bad}")
        except Exception as error:
            it.require(False, f"raises {type(error).__name__}, not EncodeError, for {bad}")
        else:
            it.require(False, f"encodes {bad} without a word")


def _places(it: Tried, any_bytes: Sequence[str] | None) -> set[int]:
    """The parts in which any byte may stand."""
    specs = dict(zip(it.codec.suffixes, it.promised(), strict=True))
    narrow = [s for s, spec in specs.items() if itemsize(spec.dtype) == 1 and spec.dtype != "BOOL"]
    chosen = narrow if any_bytes is None else any_bytes
    return {it.codec.suffixes.index(suffix) for suffix in chosen}


def _try_bytes(it: Tried, parts: Sequence[Tensor], anywhere: set[int]) -> None:
    """Whatever is stored, the finite values it decodes to are kept."""
    for seed in range(2):
        stored = _random(parts, anywhere, range(256), seed)
        decoded = it.decode(stored, "random bytes")
        finite = decoded.where(decoded.isfinite(), 0)
        for hints in (None, it.hints(stored)):
            it.require_kept(finite, "finite values of random bytes", hints)


def _try_nan_bytes(
    it: Tried, parts: Sequence[Tensor], nan_bytes: Mapping[str, Sequence[int]]
) -> None:
    """What stands for NaN is no number."""
    for suffix, choice in nan_bytes.items():
        index = it.codec.suffixes.index(suffix)
        for byte in choice:
            decoded = it.decode(_random(parts, {index}, [byte], 0), f"{suffix} of {byte}")
            it.require(bool(decoded.isnan().all()), f"decodes {suffix} of {byte} to numbers")


def _try_spoiled(it: Tried, parts: Sequence[Tensor], anywhere: set[int]) -> None:
    """Values that are not finite are found, and come back as the bytes they were."""
    import torch

    codec = it.codec
    assert codec.spoiled
    assert codec.encode
    it.require(codec.spoiled(parts) is None, "finds values that are not finite among finite ones")
    stored = _random(parts, anywhere, range(256), 5)
    decoded = it.decode(stored, "random bytes")
    true = int(decoded.isinf().sum()), int(decoded.isnan().sum())
    found = codec.spoiled(stored)
    if found is None:
        it.require(true == (0, 0), f"does not find {true} infinite and NaN values")
        return
    told = found.infinite, found.nan
    it.require(told == true, f"tells of {told} infinite and NaN values, which are {true}")
    first, where = stored[0], found.where
    it.require(where.shape == first.shape[:-1], f"finds {list(where.shape)} rows in its first part")
    kept = torch.where(where[..., None], first, torch.zeros_like(first))
    hints = it.hints(stored)
    try:
        again = codec.encode(decoded, hints, None, originals=lambda: kept)[0][where]
    except EncodeError:
        again = None
    back = again is not None and same(again, first[where])
    it.require(back, "does not put back what was not finite")
    finite = decoded.where(decoded.isfinite(), 0)
    fresh = codec.encode(finite, hints, None, originals=lambda: kept)
    held = all(map(same, fresh, codec.encode(finite, hints, None)))
    it.require(held, "puts back what is no longer in the tensor")


def _try_hints(it: Tried, parts: Sequence[Tensor], anywhere: set[int]) -> None:
    """Hints come back as they were given, in rows that decode to finite values only.

    With them, the other parts come back too: at equal hints and values they could only differ if
    different bytes meant the same. Random parts alone would not show much, as nearly all of them
    have hints that ``encode`` comes to by itself; so the others also hold a single byte throughout.
    """
    harmless = {index: _harmless(it, parts, index) for index in anywhere}
    where = {it.codec.suffixes.index(suffix) for suffix in it.codec.hints}
    seen = False
    for round_ in range(9):
        stored = list(parts)
        for index, choice in harmless.items():
            alone = round_ > 0 and index not in where
            drawn = [choice[round_ * len(choice) // 9]] if alone else choice
            stored = _random(stored, {index}, drawn, round_)
        decoded = it.decode(stored, "random bytes")
        rows = decoded.isfinite().reshape(len(decoded) if it.codec.sliceable else 1, -1).all(1)
        clean = decoded.where(rows.view(-1, *[1] * (decoded.dim() - 1)), 0)
        hints = it.hints(stored)
        made = it.hints(it.require_kept(clean, "random bytes", hints))
        for old, new, suffix in zip(hints or (), made or (), it.codec.hints, strict=True):
            back = same(old[rows], new[rows]) if it.codec.sliceable else same(old, new)
            it.require(back or not rows.any(), f"does not give {suffix} back that came as hints")
        seen |= bool(rows.any())
    it.require(seen, "decodes nothing that was tried to a row of finite values only")


def _random(
    parts: Sequence[Tensor], where: set[int], choice: Sequence[int], seed: int
) -> list[Tensor]:
    """The parts, some of them filled with bytes of a choice: all of it if there is room, else evenly
    spread over it, from either end by turns of the seed.
    """
    import torch

    noise = torch.Generator().manual_seed(seed)
    made = list(parts)
    for index in where:
        count = parts[index].numel() * parts[index].element_size()
        places = torch.arange(count) * max(1, len(choice) / count)
        drawn = torch.tensor(choice[:: -1 if seed % 2 else 1])[places.long() % len(choice)]
        drawn = drawn.to(torch.uint8)
        mixed = drawn[torch.randperm(count, generator=noise)]
        made[index] = mixed.view(parts[index].dtype).view(parts[index].shape)
    return made


def _harmless(it: Tried, parts: Sequence[Tensor], index: int) -> list[int]:
    """Bytes that leave everything finite if a part holds nothing else."""
    found = []
    for byte in range(256):
        decoded = it.codec.decode(_random(parts, {index}, [byte], 0))
        if decoded.isfinite().all():
            found.append(byte)
    return found or list(range(256))


def _try_wrong_hints(it: Tried, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Hints of another checkpoint change no value, be they far off or close."""
    import torch

    where = {it.codec.suffixes.index(suffix) for suffix in it.codec.hints}
    wrong = [_random(parts, where, choice, 3) for choice in (range(256), [0], [255])]
    for add in (0, 1, 255, 3):  # 0 leaves them right
        moved = [
            (p.contiguous().view(torch.uint8) + add).view(p.dtype).view(p.shape) for p in parts
        ]
        wrong.append([moved[i] if i in where else p for i, p in enumerate(parts)])
    for tensor in tensors:
        without = it.decode(it.encode(tensor, "values"), "values")
        for others in wrong:
            back = it.decode(it.encode(tensor, "values", it.hints(others)), "values")
            it.require(same(back, without), "lets hints change values")


def _try_options(it: Tried, kept: Tensor) -> None:
    """Values it can hold are kept with every option that this machine has."""
    for name, choices in it.codec.options.items():
        for choice in choices:
            try:
                bound = bind(it.codec, {name: choice})
            except UsageError:
                continue
            tried = Tried(bound, it.logical, it.signed_zeros)
            tried.require_kept(kept, f"what it decoded itself, with {name} {choice}")


def _try_measuring(it: Tried, values: Tensor, parts: Sequence[Tensor], kept: Tensor) -> None:
    """Its own account of what was lost is true."""
    if it.codec.measure is None:
        return
    error = (kept.double() - values.double()).abs()
    loss = it.codec.measure(values, parts)
    it.require(
        loss.elements == values.numel(), f"measures {loss.elements} of {values.numel()} elements"
    )
    told = loss.largest, loss.squares, loss.power
    true = tuple(map(float, (error.max(), error.square().sum(), values.double().square().sum())))
    close = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(told, true, strict=True))
    it.require(close, f"measures largest error, squares and power as {told}, when they are {true}")
    none = it.codec.measure(kept, it.encode(kept, "what it decoded itself"))
    nothing = none.kept == none.blocks > 0 and none.largest == none.squares == 0
    it.require(nothing, "measures a loss where there is none")
    changed = kept.clone().contiguous()
    for count, row in enumerate((0, -1), 1):
        changed.view(len(changed), -1)[row, 0] += 1
        left = it.codec.measure(changed, it.encode(kept, "what it decoded itself")).kept
        few = left == none.blocks - count
        it.require(few, f"measures {left} of {none.blocks} kept, {count} of them being changed")
