"""What ``bench_mxfp4.py`` holds our MXFP4 against: the definition, copies, other people's functions.

Nothing here uses ``gptoss_kernels``. Peers are imported when asked for, never required.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import math
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

Packed = tuple[Tensor, Tensor]  # uint8 [R, G, 16] and [R, G]

# --- the definition, in float64 --------------------------------------------------------------

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A magnitude has as many codes below it as there are of these at or below it. Ties go to the even
# code: from 0.25, 1.25, 2.5 and 5 on they go down, so there the step is just above.
STEPS = tuple(
    math.nextafter(t, 9) if down else t
    for t, down in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (1, 0) * 4, strict=False)
)
# The smallest largest-magnitude of a block that has scale byte 1, 2, ... 252, by rule. There is no
# larger scale: at 252 the largest code is the largest value that a bfloat16 holds.
FIRST = {
    "even": [1.75 * 2.0 ** (s - 126) for s in range(1, 253)],
    "floor": [2.0 ** (s - 125) for s in range(1, 253)],
    "round_up": [math.nextafter(1.5 * 2.0 ** (s - 126), math.inf) for s in range(1, 253)],
}


def defined(scale: int, code: int) -> int:
    """The bits, signed, of the bfloat16 that a code stands for."""
    if scale == 255:
        return 0x7FC0
    value = E2M1[code & 7] * 2.0 ** (scale - 127)
    try:
        upper = struct.pack(">f", value)[:2]  # exact: two significant bits
    except OverflowError:
        upper = b"\x7f\x80"
    return struct.unpack(">h", bytes([upper[0] | (code & 8) << 4, upper[1]]))[0]


@cache
def _constant(name: str, device: torch.device) -> Tensor:
    if name == "bits":
        bits = [defined(scale, code) for scale in range(256) for code in range(16)]
        return torch.tensor(bits, dtype=torch.int16, device=device)
    numbers = {"steps": STEPS, "e2m1": E2M1, **FIRST}
    numbers["powers"] = [2.0 ** (scale - 127) for scale in range(255)] + [math.nan]
    return torch.tensor(numbers[name], dtype=torch.float64, device=device)


def true_decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 ``[R, G, 16]`` and ``[R, G]`` -> the bits of bfloat16 ``[R, G*32]``."""
    bits, base = _constant("bits", blocks.device), scales.int()[..., None] * 16
    return torch.stack([bits[base + (blocks & 15)], bits[base + (blocks >> 4)]], -1).flatten(1)


def true_encode(rows: Tensor, rule: str, hint: Tensor | None = None) -> Packed:
    """``[R, K]`` and uint8 ``[R, G]`` -> uint8 ``[R, G, 16]`` and ``[R, G]``."""
    x = rows.double().unflatten(-1, (-1, 32))
    size, powers = x.abs(), _constant("powers", rows.device)
    scales = torch.bucketize(size.amax(-1), _constant(rule, rows.device), right=True)
    if hint is not None:
        quotient = size / powers[hint.int()][..., None]
        on_grid = (_constant("e2m1", rows.device)[_codes(quotient)] == quotient).all(-1)
        scales = torch.where(on_grid, hint.long(), scales)
    codes = _codes(size / powers[scales][..., None]) | (torch.signbit(x).int() << 3)
    broken = ~x.isfinite().all(-1)
    codes.masked_fill_(broken[..., None], 0)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.to(torch.uint8), scales.masked_fill_(broken, 255).to(torch.uint8)


def _codes(quotient: Tensor) -> Tensor:
    steps = _constant("steps", quotient.device)
    return torch.bucketize(quotient, steps, right=True, out_int32=True).clamp_(max=7)


def to_model(rows: Tensor, *, transpose: bool, deinterleave: bool) -> Tensor:
    """``[..., R, K]`` in the order of the blocks -> the model's layout, copied."""
    if deinterleave:
        rows = torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], -2)
    return (rows.transpose(-1, -2) if transpose else rows).contiguous()


# --- copies -----------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Milliseconds, GB/s, share of a copy's speed; and a second opinion on that share."""

    ms: float
    gbps: float
    ratio: float
    beside: float


class CpuClock:
    """Times what it is given in turn with copy_ of so many bytes of bfloat16.

    Attributes:
        copy: GB/s, read and written.
        note: how that was measured.

    """

    beside = "med"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._source = torch.ones(nbytes // 2, dtype=torch.bfloat16)
        self._target = torch.zeros_like(self._source)
        self.copy = 2e-9 * nbytes / min(self._once(self._copy) for _ in range(10))
        self.note = f"copy_ of {nbytes / 1e6:.1f} MB on {torch.get_num_threads()} threads"

    def _copy(self) -> object:
        return self._target.copy_(self._source)

    def _once(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def time(self, run: Callable[[], object], moved: int, reps: int) -> Timing:
        """``moved`` is not used: a CPU's caches make it hard to say what moves."""
        run()
        pairs: list[tuple[float, float]] = []
        end = time.perf_counter() + 20  # some peers take seconds
        while len(pairs) < reps and (len(pairs) < 2 or time.perf_counter() < end):
            pairs.append((self._once(self._copy), self._once(run)))
        copies, runs = zip(*pairs, strict=True)
        medians = statistics.median(copies) / statistics.median(runs)
        least = min(runs)
        return Timing(1e3 * least, 1e-9 * self.nbytes / least, min(copies) / least, medians)


class CudaClock:
    """Times what it is given by events, beside a copy within the device.

    Attributes:
        copy: GB/s, read and written.
        note: how that was measured.

    """

    beside = "spread"

    def __init__(self) -> None:
        self._flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
        self.copy, fill = self._ceilings()
        self.note = f"2 GiB within the device (fill {fill:.1f} GB/s)"

    def _ceilings(self) -> tuple[float, float]:
        source, target = torch.ones(2, 1 << 29, device="cuda")  # 2 GiB each
        copying = min(self._median(lambda: target.copy_(source), 20) for _ in "12")
        filling = min(self._median(lambda: target.fill_(1), 20) for _ in "12")
        return 2e-6 * source.nbytes / copying, 1e-6 * source.nbytes / filling

    def _median(self, run: Callable[[], object], reps: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(reps)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def time(self, run: Callable[[], object], moved: int, reps: int) -> Timing:
        """Twice, after a warm-up; the slower counts."""
        run()
        fast, slow = sorted(self._median(run, reps) for _ in "12")
        gbps = 1e-6 * moved / slow
        return Timing(slow, gbps, gbps / self.copy, slow / fast - 1)


def peak_of(run: Callable[[], object], device: str) -> float | None:
    """MB at the highest beyond what is held before; None where Linux will not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # or the call is served from what others gave back
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e6


def _resident(entry: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(entry + ":")[1].split()[0])


# --- other people's functions -------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A library's functions, on ``[E, R, G, 16]`` and ``[E, R, G]``.

    Attributes:
        source: what was imported.
        dequant: what they give is bfloat16.
        layout: natural, or transpose: that is ``[E, K, R]``.
        quant: by the rule of ours that theirs is closest to; bfloat16 ``[E, R, K]`` -> bytes.

    """

    source: str
    dequant: Callable[[Tensor, Tensor], Tensor]
    layout: str = "natural"
    quant: dict[str, Callable[[Tensor], Packed]] = field(default_factory=dict)


def hf(device: str, paths: Sequence[Path]) -> Peer:
    """Transformers: also what its loading of a quantized checkpoint with dequantize=True runs."""
    module = importlib.import_module("transformers.integrations.mxfp4")
    return Peer(_version("transformers"), module.convert_moe_packed_tensors, layout="transpose")


def openai(device: str, paths: Sequence[Path]) -> Peer:
    """OpenAI's gpt_oss, its reader of checkpoints with the reading taken out."""
    weights = importlib.import_module("gpt_oss.torch.weights")

    class InMemory(weights.Checkpoint):  # type: ignore[misc, name-defined]
        def __init__(self, blocks: Tensor, scales: Tensor) -> None:
            self.tensor_name_to_file = {"blocks": blocks, "scales": scales}

        def _get_tensor(self, name: str) -> Tensor:
            return self.tensor_name_to_file[name]

    return Peer(
        _version("gpt-oss"),
        lambda blocks, scales: InMemory(blocks, scales)._get_mxfp4_tensor("blocks", "scales"),
    )


def bridge(device: str, paths: Sequence[Path]) -> Peer:
    """Megatron-Bridge from 0.4 on; one file of it, since importing it all needs half a GPU stack."""
    name = "quantization_utils.py"
    inside = Path("megatron", "bridge", "models", "conversion", name)
    found = [p for folder in paths for p in (folder / name, folder / inside) if p.is_file()]
    if not found and importlib.util.find_spec("megatron"):
        spec = importlib.util.find_spec("megatron.bridge")
        places = spec.submodule_search_locations if spec else None
        found = [p for at in places or () if (p := Path(at, *inside.parts[2:])).is_file()]
    if not found:
        raise ImportError(f"no megatron-bridge: give the folder of {name} as --peer-path")
    module = _load(found[0])

    def quant(x: Tensor) -> Packed:
        rows = x.view(-1, x.shape[-1])
        like = torch.empty(len(rows), rows.shape[1] // 32, dtype=torch.float8_e8m0fnu)
        blocks, scales = module.quantize_mxfp4_e2m1_like_scale(rows, like)
        return blocks.view(torch.uint8), scales.view(torch.uint8)

    wheel = next((p.name for f in paths for p in f.glob("megatron_bridge-*.dist-info")), None)
    source = wheel.removesuffix(".dist-info") if wheel else f"megatron_bridge ({found[0]})"
    return Peer(source, module.dequantize_mxfp4, quant={"round_up": quant})


def triton_kernels(device: str, paths: Sequence[Path]) -> Peer:
    """OpenAI's triton_kernels; on PyPI its code is called tokenspeed-triton-kernels."""
    if device != "cuda":
        raise ImportError("runs on CUDA only")
    target = importlib.import_module("triton.language.target_info")
    if not hasattr(target, "is_hip_gfx1250"):  # Triton before 3.7; false on every NVIDIA GPU
        target.is_hip_gfx1250 = target.is_hip_cdna4  # type: ignore[attr-defined]
    mxfp = importlib.import_module("triton_kernels.numerics_details.mxfp")
    modes = mxfp.DequantScaleRoundingMode

    def by(mode: object) -> Callable[[Tensor], Packed]:
        return lambda x: mxfp.downcast_to_mxfp(
            x, torch.uint8, axis=-1, DEQUANT_SCALE_ROUNDING_MODE=mode
        )

    return Peer(
        _version("tokenspeed-triton-kernels", "triton-kernels"),
        lambda blocks, scales: mxfp.upcast_from_mxfp(
            blocks.flatten(-2), scales, torch.bfloat16, axis=-1
        ),
        quant={"round_up": by(modes.ROUND_UP), "floor": by(modes.ROUND_DOWN)},
    )


def torchao(device: str, paths: Sequence[Path]) -> Peer:
    """Torchao's prototype: compiled where that needs no C++ compiler (CUDA), eager on the CPU."""
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    fp4, modes = torch.float4_e2m1fn_x2, mx.ScaleCalculationMode

    def decode(blocks: Tensor, scales: Tensor) -> Tensor:
        return mx.to_dtype(blocks.flatten(-2), scales, fp4, 32, torch.bfloat16)

    def by(mode: object) -> Callable[[Tensor], Packed]:
        def encode(x: Tensor) -> Packed:
            scales, blocks = mx.to_mx(x, fp4, 32, mode)
            return blocks.view(torch.uint8), scales.view(torch.uint8)

        return run(encode)

    run = torch.compile if device == "cuda" else (lambda function: function)
    rules = {"round_up": modes.RCEIL, "floor": modes.FLOOR}
    if device != "cuda":  # torch 2.11 fails to compile it
        rules["even"] = modes.EVEN
    how = "compiled" if device == "cuda" else "eager"
    quant = {rule: by(mode) for rule, mode in rules.items()}
    return Peer(f"{_version('torchao')} {how}", run(decode), quant=quant)


PEERS = {
    "hf": hf,
    "openai": openai,
    "bridge": bridge,
    "triton_kernels": triton_kernels,
    "torchao": torchao,
}


def load_peer(name: str, device: str, paths: Sequence[Path]) -> Peer | str:
    """The peer, or in words why not."""
    for path in paths:
        if str(path) not in sys.path:
            sys.path.append(str(path))  # behind what is installed
    try:
        return PEERS[name](device, paths)
    except Exception as error:  # whatever a stranger's import raises
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_peer_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{names[-1]} of unknown version"
