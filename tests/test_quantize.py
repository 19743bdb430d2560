"""MXFP4 both ways, by command: what comes back byte for byte, what training costs, what is refused.

Judged by the format's definition, written out below in float64 without a line of ours.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert import execute
from gptoss_convert.convert import export_checkpoint, import_checkpoint
from gptoss_convert.errors import CheckpointError
from gptoss_convert.manifest import MANIFEST
from gptoss_convert.opening import Choice
from gptoss_convert.recode import prepare_dequantize, prepare_quantize
from gptoss_convert.testing import write_hf_folder
from gptoss_plugins.huggingface import sink

Tree = Callable[[Path], dict[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Blocks = tuple[Tensor, Tensor]
RULES = ["even", "floor", "round_up"]
EXPERTS = ("gate_up_proj", "down_proj")
INDEX = "model.safetensors.index.json"
KEPT = "iter_0000000/quantization/mxfp4.safetensors"
DOWN, GATE_UP = (f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))


# ---- the definition


MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
UNIT = torch.tensor([2.0 ** (s - 127) for s in range(255)] + [math.nan], dtype=torch.float64)


def codes_of(blocks: Tensor) -> Tensor:
    """``[..., 16]`` bytes -> ``[..., 32]`` codes, the low nibble first."""
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)


def packed(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def values_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """float64 ``[E, out, in]``."""
    codes = codes_of(blocks)
    magnitude = MAGNITUDES[(codes & 7).long()] * UNIT[scales.long()][..., None]
    return torch.where(codes > 7, -magnitude, magnitude).flatten(-2)


def nearest(x: Tensor, scales: Tensor) -> Tensor:
    """Codes by least distance, of two equally near the even one; ``x`` is ``[N, 32]``."""
    distance = ((x.abs() / UNIT[scales.long()][:, None])[..., None] - MAGNITUDES).abs()
    tied = distance == distance.amin(-1, keepdim=True)
    odd = torch.tensor([0, 1] * 4)
    code = torch.where(tied, odd, 2).argmin(-1).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def encoded(natural: Tensor, rule: str, hints: Tensor | None = None) -> Blocks:
    """Blocks and scales of finite float64 ``[E, out, in]``."""
    x = natural.reshape(-1, 32)
    fraction, exponent = torch.frexp(x.abs().amax(1))
    m, n = 2 * fraction, exponent - 1
    up = {"even": m >= 1.75, "floor": m > 2, "round_up": m > 1.5}[rule]
    scales = torch.where(m > 0, (n - 2 + up.int() + 127).clamp(0, 252), 0).to(torch.uint8)
    if hints is not None:
        hint = hints.reshape(-1)
        at_hint = MAGNITUDES[(nearest(x, hint) & 7).long()] * UNIT[hint.long()][:, None]
        scales = torch.where((at_hint == x.abs()).all(1), hint, scales)
    shape = (*natural.shape[:2], natural.shape[2] // 32)
    return packed(nearest(x, scales)).view(*shape, 16), scales.view(shape)


def wild(shape: tuple[int, ...], seed: int) -> Blocks:
    """Blocks of every finite kind: all scale bytes, any largest code, both zeros, all zero."""
    noise = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    codes = torch.randint(16, (count, 32), generator=noise, dtype=torch.uint8)
    most = torch.randint(8, (count, 1), generator=noise, dtype=torch.uint8)
    codes = (codes & 8) | torch.minimum(codes & 7, most)
    scales = torch.randint(253, (count,), generator=noise, dtype=torch.uint8)
    scales[:255] = torch.arange(255, dtype=torch.uint8)
    codes[:255] &= 8  # all zero, at every scale there is
    scales[255:265], scales[265:275] = 253, 254
    codes[255:265] = (codes[255:265] & 8) | (codes[255:265] & 7).clamp(max=5)
    codes[265:275] &= 11
    order = torch.randperm(count, generator=noise)
    return packed(codes[order]).view(*shape, 16), scales[order].view(shape)


# ---- folders


def loaded(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def companions(folder: Path) -> dict[str, bytes]:
    """Everything that is no tensor, no index and no manifest; config.json is one of them."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.suffix != ".safetensors" and p.name not in (INDEX, MANIFEST)
    }


def put(folder: Path, like: Path, tensors: Mapping[str, Tensor], shards: int = 3) -> Path:
    """Write tensors with the config and companions of another folder."""
    files = companions(like)
    config = json.loads(files["config.json"])
    return write_hf_folder(folder, config, tensors, shards=shards, files=files)


def assert_same_tensors(got: Path, want: Path, *, but: tuple[str, ...] = ()) -> None:
    """Names, types, shapes and bytes; of ``but`` (endings of names) the bytes may differ."""
    ours, theirs = loaded(got), loaded(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if not name.endswith(but or ("\0",)):
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def quantized(folder: Path) -> dict[str, Blocks]:
    """Blocks and scales by logical name."""
    found = loaded(folder)
    names = [n.removesuffix("_blocks") for n in found if n.endswith("_blocks")]
    assert names
    return {n: (found[n + "_blocks"], found[n + "_scales"]) for n in names}


def assert_same_values(got: Path, want: Path) -> None:
    """Signs of zeros included."""
    ours, theirs = quantized(got), quantized(want)
    assert ours.keys() == theirs.keys()
    for name, parts in theirs.items():
        left, right = values_of(*ours[name]), values_of(*parts)
        assert torch.equal(left.view(torch.int64), right.view(torch.int64)), name
    assert_same_tensors(got, want, but=("_blocks", "_scales"))


def natural(tensor: Tensor) -> Tensor:
    """Hugging Face's BF16 layout ``[E, in, out]`` -> float64 ``[E, out, in]``."""
    return tensor.double().transpose(1, 2).contiguous()


def strict_json(text: str) -> dict[str, Any]:
    """JSON as the standard has it: no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert "internal error" not in done.stderr
    assert "report it" not in done.stderr, "the user is at fault here, no plugin"
    for text in says:
        assert text in done.stderr, done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def sources(work: Path, write_tiny: Any) -> dict[str, Path]:
    """MXFP4 checkpoints of wild blocks; ``other`` is the same model with other weights."""
    found = {}
    kinds: dict[str, dict[str, Any]] = {"oblong": {}, "square": {"square": True}, "other": {}}
    for seed, (name, options) in enumerate(kinds.items()):
        tame = write_tiny(work / f"tame-{name}", mxfp4=True, seed=seed, **options)
        tensors = loaded(tame)
        for number, base in enumerate(sorted(quantized(tame))):
            parts = wild(tuple(tensors[base + "_scales"].shape), 100 * seed + number)
            tensors[base + "_blocks"], tensors[base + "_scales"] = parts
        found[name] = put(work / name, tame, tensors)
        text = json.dumps(json.loads((tame / "config.json").read_bytes()), indent=3)
        (found[name] / "config.json").write_bytes(text.replace("\n", "\r\n").encode() + b" ")
    return found


@pytest.fixture(scope="module")
def kept(work: Path, sources: dict[str, Path]) -> Path:
    """The wild checkpoint as import writes it; for reading only."""
    import_checkpoint(sources["oblong"], work / "kept")
    return work / "kept"


@pytest.fixture(scope="module")
def bare(work: Path, sources: dict[str, Path]) -> Path:
    """The same without the scales."""
    import_checkpoint(sources["oblong"], work / "bare", keep_scales=False)
    return work / "bare"


# ---- untouched


@pytest.mark.parametrize("name", ["oblong", "square"])
def test_import_and_export_give_the_source_back(
    name: str, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    megatron, out = tmp_path / "mg", tmp_path / "out"
    ok(invoke("import", "--hf-model", sources[name], "--megatron-path", megatron))
    done = ok(
        invoke("export", "--megatron-path", megatron, "--hf-path", out, "--export-dtype", "mxfp4")
    )
    assert_same_tensors(out, sources[name])
    assert companions(out) == companions(sources[name])
    blocks = sum(scales.numel() for _, scales in quantized(out).values())
    assert blocks == {"oblong": 5 * 3 * (192 * 2 + 64 * 3), "square": 5 * 3 * 192 * 2}[name]
    assert f"all {blocks:,} blocks keep their values" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_what_is_not_quantized_keeps_its_type(
    other: torch.dtype, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """And what is loses nothing to it: float16 has not the range of a block's scales."""
    parts = ("_blocks", "_scales")
    tensors = {
        name: t if name.endswith(parts) else t.to(other)
        for name, t in loaded(sources["oblong"]).items()
    }
    source = put(tmp_path / "source", sources["oblong"], tensors)
    megatron, out, full = tmp_path / "mg", tmp_path / "out", tmp_path / "full"
    done = ok(invoke("import", "--hf-model", source, "--megatron-path", megatron))
    assert ("does not fit" in done.stderr) == (other == torch.float16)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    ok(invoke(*command, "--hf-path", out))
    assert_same_tensors(out, source)
    ok(invoke("dequantize", "--hf-model", source, "--hf-path", full))
    for name, pair in quantized(source).items():
        assert torch.equal(natural(loaded(full)[name]), values_of(*pair)), name
    assert json.loads((full / "config.json").read_bytes())["torch_dtype"] == "float32"


@pytest.fixture(scope="module")
def broken(work: Path, sources: dict[str, Path]) -> Path:
    """An MXFP4 checkpoint with all scale bytes and all codes, infinite values and NaN among them."""
    tensors = loaded(sources["oblong"])
    for seed, base in enumerate(sorted(quantized(sources["oblong"]))):
        noise = torch.Generator().manual_seed(seed)
        for name in (base + "_blocks", base + "_scales"):
            tensors[name] = torch.randint(
                256, tensors[name].shape, generator=noise, dtype=torch.uint8
            )
    return put(work / "broken", sources["oblong"], tensors)


@pytest.mark.parametrize("way", ["torch_dist", "torch", "resharded", "processes", "hf", "nan"])
def test_what_is_not_finite_comes_back(way: str, broken: Path, tmp_path: Path, invoke: Run) -> None:
    megatron, out = tmp_path / "mg", tmp_path / "out"
    command = ["import", "--hf-model", broken, "--megatron-path", megatron]
    more = {
        "torch": ["--format", "torch", "--tp", "2", "--ep", "5", "--pp", "3"],
        "hf": ["--no-keep-scales"],
    }
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    runs = ranks if way == "processes" else [{}]
    done = [ok(invoke(*command, *more.get(way, []), env=environment)) for environment in runs]
    assert "infinite" in "".join(run.stderr for run in done)
    if way == "resharded":
        again = ["reshard", "--megatron-path", megatron, "--output", tmp_path / "again"]
        ok(invoke(*again, "--format", "torch", "--tp", "2"))
        megatron = tmp_path / "again"
    options = {"hf": ["--scales-from", broken], "nan": ["--on-nonfinite", "nan"]}
    export = ["export", "--megatron-path", megatron, "--hf-path", out, "--export-dtype", "mxfp4"]
    done = ok(invoke(*export, *options.get(way, [])))
    assert_same_tensors(out, broken)


def test_what_became_of_values_that_are_not_finite_is_not_forgotten(
    broken: Path, tmp_path: Path, invoke: Run
) -> None:
    """Only where the weights are what they were; the rest is refused as ever."""
    megatron = tmp_path / "mg"
    ok(invoke("import", "--hf-model", broken, "--megatron-path", megatron))
    (beside,) = megatron.glob("iter_*/quantization/mxfp4-nonfinite.safetensors")
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    beside.unlink()
    assert_refused(invoke(*command, "--hf-path", tmp_path / "out"), 1, "infinity", "--on-nonfinite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("piece", [1, 30_000])
def test_however_it_is_cut(
    workers: int,
    piece: int,
    sources: dict[str, Path],
    tmp_path: Path,
    invoke: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many shards in, several out, experts one by one, and no more memory than it must have."""
    monkeypatch.setattr(execute, "PIECE_BYTES", piece)
    monkeypatch.setattr(sink, "SHARD_BYTES", 100_000)
    source = put(tmp_path / "in", sources["oblong"], loaded(sources["oblong"]), shards=7)
    (source / "config.json").write_bytes((sources["oblong"] / "config.json").read_bytes())
    exporting = ["export", "--megatron-path", tmp_path / "mg", "--hf-path", tmp_path / "out"]
    for command in (
        ["import", "--hf-model", source, "--megatron-path", tmp_path / "mg"],
        [*exporting, "--export-dtype", "mxfp4"],
    ):
        short = invoke(*command, "--max-memory", "1kB", "--json")
        assert short.returncode == 4, short.stderr
        needed = re.search(r"needs ([\d.]+) MB", short.stderr)
        assert needed, short.stderr
        least = f"{float(needed[1]) * workers + 0.01 * workers}MB"
        ok(invoke(*command, "--max-memory", least, "--workers", workers))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    assert_same_tensors(tmp_path / "out", source)
    assert companions(tmp_path / "out") == companions(source)
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["weight_map"].keys() == loaded(source).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded(source).values())


def test_scales_are_kept_as_they_were(kept: Path, bare: Path, sources: dict[str, Path]) -> None:
    scales = {n: t for n, t in loaded(sources["oblong"]).items() if n.endswith("_scales")}
    found = load_file(kept / KEPT)
    assert found.keys() == scales.keys()
    assert all(torch.equal(found[n], t) for n, t in scales.items())
    assert not (bare / KEPT).parent.exists()
    weights = [p.name for p in (kept / "iter_0000000").glob("*.distcp")]
    assert len(weights) == 6
    for name in (*weights, ".metadata", "common.pt"):
        one, two = (folder / "iter_0000000" / name for folder in (kept, bare))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["never kept", "deleted"])
def test_without_scales_the_values_come_back(
    how: str,
    rule: str,
    kept: Path,
    bare: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    invoke: Run,
) -> None:
    megatron = bare
    if how == "deleted":
        megatron = Path(shutil.copytree(kept, tmp_path / "mg"))
        shutil.rmtree((megatron / KEPT).parent)
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "out"]
    done = ok(invoke(*command, "--export-dtype", "mxfp4", "--scale-rule", rule))
    assert_same_values(tmp_path / "out", sources["oblong"])
    assert "nothing was lost" in done.stdout
    differ = 0
    for name, (blocks, scales) in quantized(tmp_path / "out").items():
        source, before = quantized(sources["oblong"])[name]
        want = encoded(values_of(source, before), rule)
        assert torch.equal(blocks, want[0]), name
        assert torch.equal(scales, want[1]), name
        differ += int((scales != before).sum())
    assert differ > 1000


@pytest.mark.parametrize("where", ["original", "imported", "iteration"])
def test_scales_from(
    where: str, kept: Path, bare: Path, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    place = {"original": sources["oblong"], "imported": kept, "iteration": kept / "iter_0000000"}
    command = ["export", "--megatron-path", bare, "--hf-path", tmp_path / "out"]
    ok(invoke(*command, "--export-dtype", "mxfp4", "--scales-from", place[where]))
    assert_same_tensors(tmp_path / "out", sources["oblong"])
    assert companions(tmp_path / "out") == companions(sources["oblong"])


def test_scales_of_other_weights_change_no_value(
    kept: Path, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """Those that are named count, not those that were kept."""
    command = ["export", "--megatron-path", kept, "--hf-path", tmp_path / "out"]
    ok(invoke(*command, "--export-dtype", "mxfp4", "--scales-from", sources["other"]))
    assert_same_values(tmp_path / "out", sources["oblong"])
    hints = quantized(sources["other"])
    bytes_kept = 0
    for name, (blocks, scales) in quantized(tmp_path / "out").items():
        values = values_of(*quantized(sources["oblong"])[name])
        want = encoded(values, "even", hints[name][1])
        assert torch.equal(blocks, want[0])
        assert torch.equal(scales, want[1])
        bytes_kept += int((scales == quantized(sources["oblong"])[name][1]).sum())
    assert bytes_kept < 5 * 3 * (192 * 2 + 64 * 3)


def test_scales_that_will_not_do(
    bare: Path,
    sources: dict[str, Path],
    originals: dict[str, Path],
    imported: Path,
    tmp_path: Path,
    invoke: Run,
    tree: Tree,
) -> None:
    some = {n: t for n, t in loaded(sources["oblong"]).items() if not n.startswith(DOWN + "_")}
    fewer = put(tmp_path / "fewer", sources["oblong"], some)
    before = tree(tmp_path)
    command = ["export", "--megatron-path", bare, "--hf-path", tmp_path / "out"]
    for place, code, says in (
        (sources["square"], 1, [f"{DOWN}_scales", "U8 [5, 64, 2]", "U8 [5, 64, 3] is due"]),
        (fewer, 1, [str(fewer), f"{DOWN}_scales", "is not there"]),
        (originals["bf16"], 1, [str(originals["bf16"]), "holds no _scales of mxfp4"]),
        (imported, 1, [str(imported), "holds no _scales of mxfp4"]),
        (tmp_path / "nowhere", 1, ["nowhere", "does not exist"]),
        (tmp_path, 1, ["holds no checkpoint"]),
    ):
        done = invoke(*command, "--export-dtype", "mxfp4", "--scales-from", place)
        assert_refused(done, code, *says)
        assert tree(tmp_path) == before
    done = invoke(*command, "--export-dtype", "bf16", "--scales-from", sources["oblong"])
    assert_refused(done, 2, "--export-dtype")
    assert tree(tmp_path) == before


def test_damaged_scales_beside_the_checkpoint(kept: Path, tmp_path: Path, invoke: Run) -> None:
    """They are in the way of nothing but the export that needs them."""
    megatron = Path(shutil.copytree(kept, tmp_path / "mg"))
    file = megatron / KEPT
    file.write_bytes(file.read_bytes()[:-1])
    command = ["export", "--megatron-path", megatron, "--hf-path"]
    assert_refused(
        invoke(*command, tmp_path / "out", "--export-dtype", "mxfp4"),
        1, "mxfp4.safetensors", "cut short",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    ok(invoke(*command, tmp_path / "plain"))


# ---- trained


Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def plain(work: Path, originals: dict[str, Path]) -> dict[str, Path]:
    """The tame MXFP4 checkpoint in full, by element type, as import and export write it."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        megatron = work / f"plain-mg-{dtype}"
        import_checkpoint(originals["mxfp4"], megatron, torch_dtype=dtype)
        found[dtype] = work / f"plain-{dtype}"
        export_checkpoint(megatron, found[dtype])
    return found


def trained(folder: Path, source: Path, edit: Edit) -> Path:
    """A Megatron checkpoint with changed weights and no scales beside it."""
    tensors = loaded(source)
    edit(tensors)
    put(folder / "hf", source, tensors)
    import_checkpoint(folder / "hf", folder / "mg")
    assert not (folder / "mg" / KEPT).exists()
    return folder / "mg"


def nudge(tensors: dict[str, Tensor]) -> None:
    """Some weights a little off the grid, some blocks emptied, doubled or made denser."""
    noise = torch.Generator().manual_seed(7)
    for name in (DOWN, GATE_UP):
        weight = tensors[name]  # [E, in, out]
        e, k, n = weight.shape
        for _ in range(40):
            at = tuple(int(torch.randint(size, (), generator=noise)) for size in (e, k, n))
            weight[at] *= 1 + 2.0**-6
        weight[0, :32, 3] = 0
        weight[1, 32:64, 5] *= 2
        weight[e - 1, k - 32 :, n - 1] = torch.linspace(-0.11, 0.13, 32).to(weight.dtype)
        weight[2, :, 8] += 0.004


@pytest.mark.parametrize("rule", RULES)
def test_what_training_touched_is_rounded_and_the_rest_keeps_its_bytes(
    rule: str, plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    megatron = trained(tmp_path, plain["bfloat16"], nudge)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    command += ["--scales-from", originals["mxfp4"], "--scale-rule", rule]
    done = ok(invoke(*command, "--hf-path", tmp_path / "out", "--json"))
    facts = strict_json(done.stdout)["encoding"]
    assert (facts["codec"], facts["rule"]) == ("mxfp4", rule)
    weights = loaded(tmp_path / "hf")
    untouched = touched = 0
    losses = {}
    for name, (blocks, scales) in quantized(tmp_path / "out").items():
        x = natural(weights[name])
        old_blocks, old_scales = quantized(originals["mxfp4"])[name]
        want = encoded(x, rule, old_scales)
        assert torch.equal(blocks, want[0]), name
        assert torch.equal(scales, want[1]), name
        as_before = x == values_of(old_blocks, old_scales)
        whole = as_before.unflatten(-1, (-1, 32)).all(-1)
        assert torch.equal(blocks[whole], old_blocks[whole]), name
        assert torch.equal(scales[whole], old_scales[whole]), name
        untouched, touched = untouched + int(whole.sum()), touched + int((~whole).sum())
        losses[name] = (x, values_of(blocks, scales))
    assert untouched > 8000
    assert touched == 80
    assert {t["name"] for t in facts["tensors"]} == losses.keys()
    for told in facts["tensors"]:
        assert_told(told, [losses[told["name"]]])
    assert_told(facts["total"], list(losses.values()))
    assert 0 < facts["total"]["requantized"] < touched  # emptied and doubled blocks lost nothing
    for name, tensor in loaded(plain["bfloat16"]).items():
        if name not in losses:
            assert torch.equal(loaded(tmp_path / "out")[name], tensor), name


def assert_told(told: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The report on some tensors against float64 over (values, what they were written as)."""
    value = torch.cat([x.reshape(-1, 32) for x, _ in pairs])
    error = torch.cat([y.reshape(-1, 32) for _, y in pairs]) - value
    lost = (error != 0).any(1)
    assert told["blocks"] == len(value)
    assert told["requantized"] == int(lost.sum())
    assert told["kept"] == told["blocks"] - told["requantized"]
    assert told["max_error"] == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert told["rms_error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    if lost.any():
        noise = float(value.square().sum() / error.square().sum())
        assert told["sqnr_db"] == pytest.approx(10 * math.log10(noise), abs=1e-4)
    else:
        assert told["sqnr_db"] is None


def test_the_report_for_people(
    plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """The same figures, a line per tensor, and nothing cut off."""
    megatron = trained(tmp_path, plain["bfloat16"], nudge)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    command += ["--scales-from", originals["mxfp4"], "--hf-path", tmp_path / "out", "--overwrite"]
    text = ok(invoke(*command)).stdout
    facts = strict_json(ok(invoke(*command, "--json")).stdout)["encoding"]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    for told in [*facts["tensors"], {**facts["total"], "name": "all"}]:
        row = rows[told["name"]]
        counts = [f"{told[k]:,}" for k in ("blocks", "kept", "requantized")]
        assert row[:3] == counts, told
        errors = [f"{told[k]:.3g}" for k in ("max_error", "rms_error")]
        assert row[3:5] == errors, told
        assert row[5:] == ([] if told["sqnr_db"] is None else [f"{told['sqnr_db']:.2f}"]), told
    assert len(facts["tensors"]) == 6


def test_float32_is_encoded_from_float32(
    plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """By way of bfloat16 a value just above a midpoint falls on it, and then to the even side."""
    scales = {n: s for n, (_, s) in quantized(originals["mxfp4"]).items()}

    def edit(tensors: dict[str, Tensor]) -> None:
        noise = torch.Generator().manual_seed(3)
        for name in scales:
            weight = tensors[name]
            assert weight.dtype == torch.float32
            weight *= 1 + 1e-3 * torch.randn(weight.shape, generator=noise)
            above = 2.0**-12
            weight[1, :3, 2] = torch.tensor([6.0, 2.5 * (1 + above), -0.75 * (1 - above)])
            weight[1, 3:32, 2] = 0
            weight[2, 32:64, 9] = 1.75 * (1 - above)
            weight[2, 33:64, 9] = 0

    megatron = trained(tmp_path, plain["float32"], edit)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    command += ["--scales-from", originals["mxfp4"], "--hf-path", tmp_path / "out", "--json"]
    done = ok(invoke(*command))
    assert "what is not encoded stays F32" in done.stderr
    facts = {t["name"]: t for t in strict_json(done.stdout)["encoding"]["tensors"]}
    weights = loaded(tmp_path / "hf")
    for name, (blocks, found) in quantized(tmp_path / "out").items():
        x = natural(weights[name])
        want = encoded(x, "even", scales[name])
        assert torch.equal(blocks, want[0]), name
        assert torch.equal(found, want[1]), name
        twice = encoded(natural(weights[name].bfloat16()), "even", scales[name])
        assert not torch.equal(twice[0], want[0])
        assert not torch.equal(twice[1], want[1])
        assert_told(facts[name], [(x, values_of(blocks, found))])
        assert facts[name]["kept"] < 0.05 * facts[name]["blocks"]
    assert torch.equal(loaded(tmp_path / "out")["model.norm.weight"], weights["model.norm.weight"])
    assert weights["model.norm.weight"].dtype == torch.float32


def test_a_report_on_tiny_weights(
    plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    """Squares of 1e-25 are nothing in float32; the loss is there all the same."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in (DOWN, GATE_UP):
            tensors[name] *= 1.0e-25

    megatron = trained(tmp_path, plain["bfloat16"], edit)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    done = ok(invoke(*command, "--hf-path", tmp_path / "out", "--json"))
    for told in strict_json(done.stdout)["encoding"]["tensors"]:
        x = natural(loaded(tmp_path / "hf")[told["name"]])
        assert_told(told, [(x, values_of(*quantized(tmp_path / "out")[told["name"]]))])


# ---- NaN and infinity


def spoil(value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[GATE_UP][3, 40, 37] = value
        tensors[GATE_UP][4, 1, 2] = value
        tensors[DOWN][2, 65, 41] = value

    return edit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_has_no_code_stops_the_export(
    value: float,
    piece: int,
    plain: dict[str, Path],
    tmp_path: Path,
    invoke: Run,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execute, "PIECE_BYTES", piece)
    megatron = trained(tmp_path, plain["bfloat16"], spoil(value))
    before = tree(tmp_path)
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "new" / "out"]
    for workers in (1, 3):
        done = invoke(*command, "--export-dtype", "mxfp4", "--workers", workers)
        assert done.stderr.count("\n") == 1
        (where,) = re.findall(r"error: (\S+): output (\d+), inputs (\d+) to (\d+) ", done.stderr)
        assert where in [
            (f"{GATE_UP}[3]", "37", "32", "63"),
            (f"{DOWN}[2]", "41", "64", "95"),
        ]
        what, way_out = ("NaN", "nan") if math.isnan(value) else ("infinity", "nan or saturate")
        assert_refused(done, 1, f"hold {what}, which", f"--on-nonfinite {way_out}\n")
        assert tree(tmp_path) == before
    done = invoke("quantize", "--hf-model", tmp_path / "hf", "--hf-path", tmp_path / "new")
    assert_refused(done, 1, "[3]: output 37, inputs 32 to 63")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_makes_the_block_nan(
    value: float, plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    megatron = trained(tmp_path, plain["bfloat16"], spoil(value))
    command = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "out", "--json"]
    command += ["--export-dtype", "mxfp4", "--scales-from", originals["mxfp4"]]
    done = ok(invoke(*command, "--on-nonfinite", "nan"))
    told = {t["name"]: t for t in strict_json(done.stdout)["encoding"]["tensors"]}
    for name, (blocks, scales) in quantized(tmp_path / "out").items():
        old_blocks, old_scales = quantized(originals["mxfp4"])[name]
        spots = {GATE_UP: [(3, 37, 1), (4, 2, 0)], DOWN: [(2, 41, 2)]}.get(name, [])
        for spot in spots:
            assert scales[spot] == 255
            blocks[spot], scales[spot] = old_blocks[spot], old_scales[spot]
        assert torch.equal(blocks, old_blocks), name
        assert torch.equal(scales, old_scales), name
        assert told[name]["requantized"] == len(spots)


def test_saturate_keeps_infinity_finite_and_refuses_nan(
    plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    megatron = trained(tmp_path / "inf", plain["bfloat16"], spoil(-math.inf))
    command = ["export", "--hf-path", tmp_path / "out", "--export-dtype", "mxfp4", "--json"]
    command += ["--scales-from", originals["mxfp4"], "--on-nonfinite", "saturate"]
    done = ok(invoke(*command, "--megatron-path", megatron))
    strict_json(done.stdout)
    found = {name: values_of(*parts) for name, parts in quantized(tmp_path / "out").items()}
    largest = -1.5 * 2.0**127
    assert float(found[GATE_UP][3, 37, 40]) == largest
    assert float(found[GATE_UP][4, 2, 1]) == largest
    assert float(found[DOWN][2, 41, 65]) == largest
    assert all(values.isfinite().all() for values in found.values())
    megatron = trained(tmp_path / "nan", plain["bfloat16"], spoil(math.nan))
    shutil.rmtree(tmp_path / "out")
    done = invoke(*command, "--megatron-path", megatron)
    assert_refused(done, 1, "NaN")
    advice = done.stderr.partition("; ")[2]
    assert "saturate" not in advice, "that is what was said, and it does not help"
    assert not (tmp_path / "out").exists()


# ---- wrong usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on-nonfinite", "ignore"], ["ignore", "error", "nan", "saturate"]),
        (["--scale-rule", "ceil"], ["ceil", "even", "floor", "round_up"]),
        (["--codec-backend", "cuda"], ["cuda", "triton", "numba", "table", "reference"]),
        (["--codec-option", "rule=ceil"], ["ceil", "even", "floor", "round_up"]),
        (["--codec-option", "colour=red"], ["colour", "backend", "rule", "on_nonfinite"]),
        (["--codec-option", "rule"], ["NAME=VALUE"]),
        (["--export-dtype", "int8"], ["int8", "bfloat16", "mxfp4"]),
        (["--export-dtype", "bool"], ["bool", "bfloat16", "mxfp4"]),
        (["--export-dtype", "float64"], ["float64", "bfloat16", "mxfp4"]),
        (["--export-dtype", "mxfp6"], ["mxfp6", "bfloat16", "mxfp4"]),
        (["--export-dtype", ""], ["export-dtype"]),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(
    arguments: list[str], says: list[str], kept: Path, tmp_path: Path, invoke: Run
) -> None:
    command = ["--megatron-path", kept, "--export-dtype", "mxfp4", *arguments]
    for done in (
        invoke("export", *command, "--hf-path", tmp_path / "new" / "out"),
        invoke("plan", *command),
    ):
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        for text in says:
            assert text in done.stderr, done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--scale-rule", "ceil"], ["--on-nonfinite", "ignore"], ["--codec-backend", "cuda"]],
)
def test_a_wrong_value_is_refused_even_where_nothing_is_encoded(
    arguments: list[str], kept: Path, tmp_path: Path, invoke: Run
) -> None:
    """Who says --scale-rule expects it to matter, and has perhaps forgotten --export-dtype."""
    done = invoke("export", "--megatron-path", kept, "--hf-path", tmp_path / "out", *arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_needs_a_gpu(
    kept: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    invoke: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    for command in (
        ["export", "--megatron-path", kept, "--hf-path", out, "--export-dtype", "mxfp4"],
        ["import", "--hf-model", sources["oblong"], "--megatron-path", out],
        ["dequantize", "--hf-model", sources["oblong"], "--hf-path", out],
    ):
        done = invoke(*command, "--codec-backend", "triton")
        assert_refused(done, 2, "triton", "CUDA")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["table", "reference", "numba"])
def test_every_backend_by_name(
    backend: str, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    chosen = ["--codec-backend", backend]
    ok(
        invoke(
            "import", "--hf-model", sources["oblong"], "--megatron-path", tmp_path / "mg", *chosen
        )
    )
    command = ["export", "--megatron-path", tmp_path / "mg", "--hf-path", tmp_path / "out"]
    done = ok(invoke(*command, "--export-dtype", "mxfp4", "--json", *chosen))
    assert strict_json(done.stdout)["encoding"]["backend"] == backend
    assert_same_tensors(tmp_path / "out", sources["oblong"])


# ---- Hugging Face to Hugging Face


def test_dequantize(sources: dict[str, Path], kept: Path, tmp_path: Path, invoke: Run) -> None:
    """[E, in, out], as transformers has it; the same as by way of Megatron."""
    source, out = sources["oblong"], tmp_path / "out"
    done = ok(invoke("dequantize", "--hf-model", source, "--hf-path", out, "--json"))
    facts = strict_json(done.stdout)
    assert facts["schema"] == "gptoss-convert.result/1"
    assert facts["direction"] == "dequantize"
    assert facts["encoding"] is None
    found = loaded(out)
    assert facts["bytes_out"] == sum(t.nbytes for t in found.values()) == 2 * facts["parameters"]
    before = loaded(source)
    for name, parts in quantized(source).items():
        values = values_of(*parts)
        assert found[name].dtype == torch.bfloat16
        assert found[name].shape == values.transpose(1, 2).shape
        back = natural(found.pop(name))
        assert torch.equal(back.view(torch.int64), values.view(torch.int64)), name
        del before[name + "_blocks"], before[name + "_scales"]
    assert found.keys() == before.keys()
    assert all(torch.equal(found[n], t) for n, t in before.items())
    ok(invoke("export", "--megatron-path", kept, "--hf-path", tmp_path / "via"))
    assert_same_tensors(out, tmp_path / "via")
    assert companions(out) == companions(tmp_path / "via")
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())


def test_quantize_gives_back_what_was_dequantized(
    sources: dict[str, Path], bare: Path, tmp_path: Path, invoke: Run
) -> None:
    source, full = sources["oblong"], tmp_path / "full"
    ok(invoke("dequantize", "--hf-model", source, "--hf-path", full))
    command = ["quantize", "--hf-model", full, "--hf-path"]
    ok(invoke(*command, tmp_path / "same", "--scales-from", source))
    assert_same_tensors(tmp_path / "same", source)
    done = ok(invoke(*command, tmp_path / "new", "--json"))
    facts = strict_json(done.stdout)
    assert (facts["direction"], facts["encoding"]["codec"]) == ("quantize", "mxfp4")
    assert facts["encoding"]["total"]["requantized"] == 0
    assert_same_values(tmp_path / "new", source)
    ok(
        invoke(
            "export", "--megatron-path", bare, "--export-dtype", "mxfp4",
            "--hf-path", tmp_path / "via",
        )
    )  # fmt: skip
    assert_same_tensors(tmp_path / "new", tmp_path / "via")
    theirs = json.loads((source / "config.json").read_bytes())
    for name in ("same", "new"):
        config = json.loads((tmp_path / name / "config.json").read_bytes())
        assert config["quantization_config"] == theirs["quantization_config"]
        files = companions(tmp_path / name)
        del files["config.json"]
        assert files == {n: b for n, b in companions(source).items() if n != "config.json"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_quantize_weights_that_never_were_mxfp4(
    rule: str, dtype: torch.dtype, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    tensors = {n: t.to(dtype) for n, t in loaded(originals["bf16"]).items()}
    source = put(tmp_path / "in", originals["bf16"], tensors)
    command = ["quantize", "--hf-model", source, "--hf-path", tmp_path / "out"]
    done = ok(invoke(*command, "--scale-rule", rule, "--json"))
    facts = {t["name"]: t for t in strict_json(done.stdout)["encoding"]["tensors"]}
    found = quantized(tmp_path / "out")
    assert len(found) == 6
    for name, parts in found.items():
        x = natural(tensors[name])
        want = encoded(x, rule)
        assert torch.equal(parts[0], want[0]), name
        assert torch.equal(parts[1], want[1]), name
        assert_told(facts[name], [(x, values_of(*parts))])
        assert 15 < facts[name]["sqnr_db"] < 25
    rest = loaded(tmp_path / "out")
    for name, tensor in tensors.items():
        if name not in found:
            assert torch.equal(rest[name], tensor.bfloat16()), name


def test_what_there_is_to_quantize_and_dequantize(
    sources: dict[str, Path],
    originals: dict[str, Path],
    kept: Path,
    tmp_path: Path,
    invoke: Run,
) -> None:
    out = ["--hf-path", tmp_path / "out"]
    quantized_already, never = sources["oblong"], originals["bf16"]
    for command, code, says in (
        (["quantize", "--hf-model", quantized_already], 1, "is mxfp4 already"),
        (["dequantize", "--hf-model", never], 1, "is not quantized"),
        (["quantize", "--hf-model", kept], 1, "holds no checkpoint in the format huggingface"),
        (["quantize", "--hf-model", never, "--codec", "mxfp6"], 2, "mxfp6"),
        (["quantize", "--hf-model", never, "--codec", "bfloat16"], 2, "codec"),
        (["quantize", "--hf-model", never, "--scales-from", never], 1, "holds no _scales"),
        (["quantize", "--hf-model", tmp_path / "nowhere"], 1, "does not exist"),
    ):
        assert_refused(invoke(*command, *out), code, says)
        assert list(tmp_path.iterdir()) == []
    for command in (["quantize"], ["quantize", "--hf-model", never], ["dequantize", *out]):
        assert invoke(*command).returncode == 2


def test_sizes_that_blocks_do_not_divide(write_tiny: Any, tmp_path: Path, invoke: Run) -> None:
    source = write_tiny(tmp_path / "hf", intermediate_size=100)
    import_checkpoint(source, tmp_path / "mg")
    commands = (
        ["export", "--megatron-path", tmp_path / "mg", "--export-dtype", "mxfp4"],
        ["quantize", "--hf-model", source],
    )
    for command in commands:
        done = invoke(*command, "--hf-path", tmp_path / "out")
        names = [f"model.layers.{n}.mlp.experts.down_proj" for n in range(3)]
        assert_refused(done, 1, *names, "3 problems", "does not divide 100")
        assert "gate_up_proj" not in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_what_may_be_replaced(
    command: str, sources: dict[str, Path], originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    source = {"quantize": originals["bf16"], "dequantize": sources["oblong"]}[command]
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    run = [command, "--hf-model", mine, "--hf-path"]
    for place in (mine, mine / "below", tmp_path):
        assert_refused(invoke(*run, place, "--overwrite"), 1, "choose another target")
    ok(invoke(*run, tmp_path / "out"))
    first = companions(tmp_path / "out")
    assert_refused(invoke(*run, tmp_path / "out"), 1, "--overwrite")
    ok(invoke(*run, tmp_path / "out", "--overwrite"))
    assert companions(tmp_path / "out") == first
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo").write_text("keep me")
    assert_refused(invoke(*run, tmp_path / "notes", "--overwrite"), 1, "is not empty")
    assert (tmp_path / "notes" / "todo").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "notes", "out"]


# ---- looking first


def test_plan_tells_of_scales(
    kept: Path, bare: Path, sources: dict[str, Path], invoke: Run
) -> None:
    command = ["plan", "--megatron-path"]
    as_mxfp4 = ["--export-dtype", "mxfp4", "--scale-rule", "floor"]
    with_scales = strict_json(ok(invoke(*command, kept, *as_mxfp4, "--json")).stdout)
    without = strict_json(ok(invoke(*command, bare, *as_mxfp4, "--json")).stdout)
    assert with_scales["schema"] == "gptoss-convert.plan/1"
    assert (with_scales["hints_found"], without["hints_found"]) == (True, False)
    assert with_scales["encoding"]["rule"] == "floor"
    source = loaded(sources["oblong"])
    assert with_scales["bytes_out"] == sum(t.nbytes for t in source.values())
    written = [
        part
        for step in with_scales["steps"]
        for output in step["outputs"]
        for part in output.get("parts", [output["name"]])
    ]
    assert sorted(written) == sorted(source)
    text = ok(invoke(*command, kept, *as_mxfp4)).stdout
    assert re.search(r"encoded as +mxfp4 \(.*rule floor.*\), scales: the source's", text)
    assert "scales: new ones" in ok(invoke(*command, bare, *as_mxfp4)).stdout
    plan = ["plan", "--hf-model", sources["oblong"], "--json"]
    importing = strict_json(ok(invoke(*plan)).stdout)
    assert importing["hints_kept"] == 5 * 3 * (192 * 2 + 64 * 3)
    assert strict_json(ok(invoke(*plan, "--no-keep-scales")).stdout)["hints_kept"] == 0
    assert importing["encoding"] is None


def test_plan_of_an_mxfp4_export_imports_no_torch(kept: Path) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from gptoss_convert.cli import main\n"
        "done = CliRunner().invoke(main, sys.argv[1:]); assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'triton', 'numba', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    command = ["plan", "--megatron-path", str(kept), "--export-dtype", "mxfp4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_inspect_what_was_written(
    kept: Path, bare: Path, sources: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    export_checkpoint(kept, tmp_path / "out", export_dtype="mxfp4")
    ours = strict_json(ok(invoke("inspect", tmp_path / "out", "--json")).stdout)
    theirs = strict_json(ok(invoke("inspect", sources["oblong"], "--json")).stdout)
    assert ours["problems"] == []
    for name in ("parameters", "tensors", "bytes", "bytes_by_dtype", "megatron_config"):
        assert ours[name] == theirs[name], name
    assert ours["layout"]["quantization"] == "mxfp4"
    layouts = [
        strict_json(ok(invoke("inspect", folder, "--json")).stdout)["layout"]
        for folder in (kept, bare)
    ]
    assert [layout["kept_for_requantizing"] for layout in layouts] == [["mxfp4"], []]


# ---- from Python


def test_python_interface(
    kept: Path, sources: dict[str, Path], originals: dict[str, Path], tmp_path: Path
) -> None:
    import_checkpoint(sources["oblong"], tmp_path / "mg", keep_scales=False)
    result = export_checkpoint(
        tmp_path / "mg", tmp_path / "out", export_dtype="mxfp4", scales_from=kept
    )
    assert_same_tensors(tmp_path / "out", sources["oblong"])
    assert result.losses.keys() == quantized(sources["oblong"]).keys()
    assert all(loss.kept == loss.blocks for loss in result.losses.values())
    prepare_dequantize(sources["oblong"]).run(tmp_path / "full")
    again = prepare_quantize(tmp_path / "full", "mxfp4", scales_from=sources["oblong"])
    assert again.run(tmp_path / "back").losses.keys() == result.losses.keys()
    assert_same_tensors(tmp_path / "back", sources["oblong"])


def test_a_codec_loads_beside_the_first_tensors(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with its options, and what goes wrong there is left to the first use."""
    asked = []

    def load(*words: object, **options: object) -> None:
        asked.append((words, options, threading.current_thread().name))
        raise OSError("not now")

    monkeypatch.setattr("gptoss_plugins.mxfp4.load", load)
    choice = Choice(options={"rule": "floor"})
    prepare_dequantize(sources["oblong"]).run(tmp_path / "full")
    prepare_quantize(tmp_path / "full", "mxfp4", choice=choice).run(tmp_path / "back")
    (_, decoding, thread), (words, encoding, _) = asked
    assert thread.startswith("load")
    assert words == ("cpu",)
    assert decoding == {"encodes": False}
    assert encoding == {"encodes": True, "rule": "floor"}


# ---- killed


class Server:
    """Runs commands in forked children that die at a step; see test_crash.py, which it runs."""

    def __init__(self, log: Path) -> None:
        self.log = log
        script = Path(__file__).with_name("test_crash.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *argv: object, at: int = 0) -> tuple[int, str, list[str]]:
        """Exit code, standard output, and the steps that changed the disk."""
        steps = ["mkdir", "pwrite", "ftruncate", "fsync", "rename", "unlink"]
        job = {
            "argv": [*map(str, argv), "--workers", "1", "--json", "--codec-backend", "table"],
            "at": at,
            "what": "SIGKILL",
            "kill_after": None,
            "shard_bytes": 120_000,
            "steps": steps,
            "log": str(self.log),
        }
        calls = Path(f"{self.log}.calls")
        calls.unlink(missing_ok=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        made = calls.read_text().split() if calls.exists() else []
        return answer["code"], Path(f"{self.log}.out").read_text(), made

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server") / "run")
    yield found
    found.close()


@pytest.mark.slow
def test_killed_and_run_again(
    server: Server, plain: dict[str, Path], originals: dict[str, Path], tmp_path: Path, tree: Tree
) -> None:
    """The same bytes, and a report on all tensors, whoever wrote them; no notes stay behind."""
    megatron = trained(tmp_path, plain["bfloat16"], nudge)
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    command += ["--scales-from", originals["mxfp4"], "--hf-path"]
    code, out, calls = server(*command, tmp_path / "whole")
    assert code == 0
    told, whole = strict_json(out)["encoding"], tree(tmp_path / "whole")
    assert len(told["tensors"]) == 6
    shards = [name for name in whole if name.endswith(".safetensors")]
    assert len(shards) >= 3
    assert not [name for name in whole if "loss" in name]
    last = len(calls)
    assert last > 40
    place = tmp_path / "place"
    for at in sorted({*range(5, last - 11, 14), *range(last - 11, last + 1)}):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        code, _, _ = server(*command, place / "out", at=at)
        assert code == -signal.SIGKILL
        done = (place / "out").exists()
        code, out, _ = server(*command, place / "out", *(["--overwrite"] if done else []))
        assert code == 0
        assert [p.name for p in place.iterdir()] == ["out"]
        assert tree(place / "out") == whole, at
        assert strict_json(out)["encoding"] == told, f"killed at step {at}: {calls[at - 1]}"


def test_killed_import_keeps_the_scales(
    server: Server, sources: dict[str, Path], kept: Path, tmp_path: Path, tree: Tree
) -> None:
    """The scales are a part like the layers are: whole, or made again."""
    command = ["import", "--hf-model", sources["oblong"], "--megatron-path", tmp_path / "mg"]
    _, _, calls = server(*command)
    whole = tree(tmp_path / "mg")
    assert whole == tree(kept)
    for which in (0, 1):
        shutil.rmtree(tmp_path / "mg")
        at = [n for n, call in enumerate(calls, 1) if call == "rename"][which]
        assert server(*command, at=at)[0] == -signal.SIGKILL
        assert server(*command)[0] == 0
        assert tree(tmp_path / "mg") == whole


def test_another_rule_starts_afresh(
    server: Server, bare: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Shards by one rule are never finished by another, nor by other scales."""
    command = ["export", "--megatron-path", bare, "--export-dtype", "mxfp4"]
    command += ["--hf-path", tmp_path / "out"]
    _, _, calls = server(*command)
    at = [n for n, call in enumerate(calls, 1) if call == "rename"][3]
    for other in (["--scale-rule", "round_up"], ["--scales-from", sources["oblong"]]):
        shutil.rmtree(tmp_path / "out")
        assert server(*command, at=at)[0] == -signal.SIGKILL
        code, out, _ = server(*command, *other)
        assert code == 0
        assert strict_json(out)["resumed"] is False
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        if other[0] == "--scales-from":
            assert_same_tensors(tmp_path / "out", sources["oblong"])


def test_a_changed_file_of_scales_is_noticed(kept: Path, tmp_path: Path) -> None:
    """Half of the blocks by old scales, half by new ones, would be nobody's bytes."""
    megatron = Path(shutil.copytree(kept, tmp_path / "mg"))

    def meddle(_: int) -> None:
        with open(megatron / KEPT, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))

    with pytest.raises(CheckpointError, match="changed while"):
        export_checkpoint(
            megatron, tmp_path / "out", export_dtype="mxfp4", workers=1, progress=meddle
        )
    assert [p.name for p in tmp_path.iterdir()] == ["mg"]
