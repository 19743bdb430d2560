"""Whole conversions at full 20B width: time, CPU and memory, beside ``cp`` and the disk.

    python benchmarks/bench_convert.py --layers 4 --rounds 5 --folder /some/disk/bench
    python benchmarks/bench_convert.py --directions import-bf16,export-bf16 --workers 1,2
    python benchmarks/bench_convert.py --null --sparse-tool ../shared/tools/sparse.py

Makes checkpoints of random values, converts each once and compares what came out: exports with the
source's own bytes, or with the decoder that is written like the specification. Then, in every
round and for every direction, in turn:

* ``gptoss-convert``, a process of its own per number of workers
* ``cp``: the output's files copied, and sync
* ``raw``: the same files copied by ``dd``, direct I/O both ways, and fsync

What is read is dropped from the page cache before each. Prints medians; ratios are of one round.
``x moved`` is beside what the raw copy's speed allows for all that is read and written: exports to
MXFP4 read twice what they write.
``ok`` is left out where a limit is passed, and the exit code is then 1; the last line is JSON. 4
layers take 45 GB of disk (2 GB of it for every further worker), less for fewer directions.

``--null`` runs the full-size 20B and 120B checkpoints, files of holes, through the executor with
nothing written, and compares the memory of both. ``--hide-numba`` does as if numba were not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from gptoss_convert.blockio import SLOT, BlockWriter
from gptoss_convert.testing import hf_specs
from gptoss_kernels import mxfp4
from gptoss_plugins.gptoss import gptoss_convert_models

MIB = 1 << 20
LEAST_PEAK = 450 * MIB
LEAST_CPU = 0.8  # seconds per GB written
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
TINY = {"hidden_size": 96, "intermediate_size": 64, "num_local_experts": 6, "vocab_size": 512}
HIDE = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        hidden = name.split(".")[0] in ("numba", "llvmlite")
        return None if hidden else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
LAUNCH = """
import json, os, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
print(json.dumps([status, wall, cpu, usage.ru_maxrss * 1024]))
"""
CONVERT = "from gptoss_convert.cli import run; run()"


class Direction(NamedTuple):
    """A conversion: command and options, the folder it reads, and the most it may take of cp."""

    command: tuple[str, ...]
    source: str
    limit: float


DIRECTIONS = {
    "import-mxfp4": Direction(("import", "--hf-model", "--megatron-path"), "mxfp4", 0.6),
    "import-bf16": Direction(("import", "--hf-model", "--megatron-path"), "bf16", 0.9),
    "export-bf16": Direction(
        ("export", "--megatron-path", "--hf-path", "--export-dtype", "bfloat16"), "megatron", 0.9
    ),
    "export-mxfp4": Direction(
        ("export", "--megatron-path", "--hf-path", "--export-dtype", "mxfp4"), "megatron", 0.9
    ),
    "reshard": Direction(("reshard", "--megatron-path", "--output"), "megatron", 0.9),
}


class Run(NamedTuple):
    """One process: wall and CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


# --- checkpoints ---------------------------------------------------------------------------------


def make_checkpoint(folder: Path, form: str, layers: int, sizes: dict[str, int]) -> None:
    """One safetensors file of random values, written without holding a tensor."""
    kinds = ["sliding_attention", "full_attention"] * layers
    config = {**CONFIG, **sizes, "num_hidden_layers": layers, "layer_types": kinds[:layers]}
    if form == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4"}
    table, end = {}, 0
    for name, dtype, shape, nbytes in stored(config, form):
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True)
    writer = BlockWriter(folder / "model.safetensors", 8 + len(header) + end)
    writer.append_bytes(len(header).to_bytes(8, "little") + header)
    pools = {
        "_blocks": torch.randint(256, (SLOT,), dtype=torch.uint8),
        "_scales": torch.randint(116, 124, (SLOT,), dtype=torch.uint8),
        "": (torch.randn(SLOT // 2) * 0.02).bfloat16().view(torch.uint8),
    }
    for name, _, _, nbytes in stored(config, form):
        pool = next(pool for suffix, pool in pools.items() if name.endswith(suffix))
        for start in range(0, nbytes, SLOT - 4098):  # or experts would be alike
            writer.append(pool[: min(SLOT - 4098, nbytes - start)])
    writer.close()
    (folder / "config.json").write_text(json.dumps(config))


def stored(config: dict[str, Any], form: str) -> Iterator[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and bytes of every stored tensor."""
    (family,) = gptoss_convert_models()
    for name, spec in hf_specs(family, config).items():
        if form == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = spec.shape
            blocks = experts * rows * inner // 32
            yield name + "_blocks", "U8", [experts, rows, inner // 32, 16], blocks * 16
            yield name + "_scales", "U8", [experts, rows, inner // 32], blocks
        else:
            yield name, spec.dtype, list(spec.shape), spec.nbytes


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def size_of(folder: Path) -> int:
    """Bytes of all of them."""
    return sum(path.stat().st_size for path in files_of(folder))


def forget(folder: Path) -> None:
    """Put everything on the disk, and drop a folder's files from the page cache."""
    os.sync()
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- what came out -------------------------------------------------------------------------------


def rows_of(folder: Path) -> Iterator[tuple[str, int, Tensor]]:
    """Every tensor's name and dim 0, one by one, by safetensors' own reader."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                size = part.get_shape()[0]
                for row in range(size) if len(part.get_shape()) > 2 else ():
                    yield name, row, part[row : row + 1]
                if len(part.get_shape()) <= 2:
                    yield name, -1, part[:]


class Source:
    """A checkpoint's tensors, decoded if need be."""

    def __init__(self, folder: Path) -> None:
        self._file = safe_open(folder / "model.safetensors", "pt")
        self._names = set(self._file.keys())

    def get(self, name: str, row: int) -> Tensor:
        """The tensor or one row of its dim 0; BF16 out of MXFP4 by the reference."""
        if name in self._names:
            return self._part(name, row)
        blocks, scales = (self._part(name + suffix, row) for suffix in ("_blocks", "_scales"))
        return mxfp4.decode(blocks, scales, transpose=True, backend="reference")

    def _part(self, name: str, row: int) -> Tensor:
        part = self._file.get_slice(name)
        found: Tensor = part[:] if row < 0 else part[row : row + 1]
        return found


def compare(made: Path, source: Path, every: int) -> None:
    """Exported tensors are the source's, bit for bit; of what must be decoded every so many rows."""
    wanted = Source(source)
    for name, row, tensor in rows_of(made):
        if row >= 0 and row % every:
            continue
        like = wanted.get(name, row)
        if tensor.shape != like.shape or not torch.equal(
            tensor.view(torch.uint8), like.view(torch.uint8)
        ):
            raise SystemExit(f"{made}: {name}[{row}] differs from {source}")


# --- running -------------------------------------------------------------------------------------


class Bench:
    """The folders and how processes are started in them."""

    def __init__(self, folder: Path, *, hide_numba: bool) -> None:
        self.folder = folder
        self._before = HIDE if hide_numba else ""

    def child(self, code: str, *arguments: str) -> Run:
        """Python in a process of its own, by way of a small one: a process begins with the peak of
        the one that starts it.
        """
        command = [sys.executable, "-c", self._before + code, *arguments]
        launch = [sys.executable, "-c", LAUNCH, *command]
        done = subprocess.run(launch, check=True, stdout=subprocess.PIPE)
        status, *measured = json.loads(done.stdout)
        if status:
            raise SystemExit(f"failed: {' '.join(arguments)}")
        return Run(*measured)

    def convert(self, direction: Direction, source: Path, target: Path, workers: int = 0) -> Run:
        """One conversion, after its input was dropped from the page cache."""
        command, give, take, *more = direction.command
        arguments = [command, give, str(source), take, str(target), *more, "--no-progress"]
        arguments += ["--workers", str(workers)] if workers else []
        forget(source)
        return self.child(CONVERT, *arguments)

    def prepare(self, names: list[str], layers: int, sizes: dict[str, int]) -> None:
        """Make what the directions read, and check once what they make."""
        needs = {DIRECTIONS[name].source for name in names}
        if needs & {"mxfp4", "megatron"}:
            make_checkpoint(self.folder / "mxfp4", "mxfp4", layers, sizes)
            self._checked("import-mxfp4", "mxfp4", "export-mxfp4")
            (self.folder / "made").rename(self.folder / "megatron")
        if "export-bf16" in names:
            self._checked("export-bf16", "mxfp4", None, every=16)
        if "import-bf16" in names:
            make_checkpoint(self.folder / "bf16", "bf16", layers, sizes)
            self._checked("import-bf16", "bf16", "export-bf16")
        if "reshard" in names:
            self._checked("reshard", "mxfp4", "export-mxfp4")
        self._drop("made")
        if "megatron" not in needs:
            self._drop("megatron")

    def _checked(self, name: str, origin: str, back: str | None, every: int = 1) -> None:
        """Convert to ``made``; that, or what is made of it on the way back, is as the origin."""
        self._drop("made")
        direction, made = DIRECTIONS[name], self.folder / "made"
        self.convert(direction, self.folder / direction.source, made)
        if back is None:
            compare(made, self.folder / origin, every)
            return
        self.convert(DIRECTIONS[back], made, self.folder / "back")
        compare(self.folder / "back", self.folder / origin, every)
        self._drop("back")

    def _drop(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def round(
        self, direction: Direction, workers: list[int]
    ) -> tuple[list[Run], float, float, int]:
        """A run per number of workers; seconds of cp and of the raw copy; bytes of the output."""
        made, copied = self.folder / "made", self.folder / "copied"
        runs = []
        for count in workers:
            self._drop("made")
            runs.append(self.convert(direction, self.folder / direction.source, made, count))
        seconds = []
        for copy in (copy_by_cp, copy_raw):
            forget(made)
            seconds.append(timed(lambda copy=copy: copy(made, copied)))
            self._drop("copied")
        nbytes = size_of(made)
        self._drop("made")
        return runs, *seconds, nbytes  # type: ignore[return-value]


def timed(action: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def copy_by_cp(source: Path, target: Path) -> None:
    """As a user would, and everything on the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()


def copy_raw(source: Path, target: Path) -> None:
    """By direct I/O in blocks of 8 MiB; small files as they are."""
    for path in files_of(source):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        direct = ["iflag=direct", "oflag=direct"] if path.stat().st_size > MIB else []
        command = ["dd", f"if={path}", f"of={to}", "bs=8M", "conv=fsync", "status=none", *direct]
        subprocess.run(command, check=True)


# --- tables --------------------------------------------------------------------------------------


def measure(
    bench: Bench, names: list[str], rounds: int, workers: list[int]
) -> list[dict[str, Any]]:
    """All rounds, each with every direction in turn; a row per direction and number of workers."""
    found: dict[tuple[str, int], list[tuple[Run, float, float, int]]] = {}
    for number in range(1, rounds + 1):
        for name in names:
            runs, cp, raw, nbytes = bench.round(DIRECTIONS[name], workers)
            for count, run in zip(workers, runs, strict=True):
                found.setdefault((name, count), []).append((run, cp, raw, nbytes))
            walls = ", ".join(f"{run.wall:.1f}" for run in runs)
            print(f"round {number} {name}: {walls} s; cp {cp:.1f} s, raw {raw:.1f} s", flush=True)
    reads = {name: size_of(bench.folder / DIRECTIONS[name].source) for name in names}
    return [row_of(*key, measured, reads[key[0]]) for key, measured in found.items()]


def row_of(
    name: str, workers: int, measured: list[tuple[Run, float, float, int]], read: int
) -> dict[str, Any]:
    """Medians of the rounds, the highest peak, and whether the limits hold."""
    nbytes = measured[0][3]
    to_raw = statistics.median(run.wall / raw for run, _, raw, _ in measured)
    row: dict[str, Any] = {
        "direction": name,
        "workers": workers or "default",
        "wall_s": statistics.median(run.wall for run, *_ in measured),
        "gb_written": nbytes / 1e9,
        "to_cp": statistics.median(run.wall / cp for run, cp, _, _ in measured),
        "to_raw": to_raw,
        "to_moved": to_raw * 2 * nbytes / (read + nbytes),
        "cpu_s_per_gb": statistics.median(run.cpu for run, *_ in measured) / nbytes * 1e9,
        "peak_mib": max(run.peak for run, *_ in measured) / MIB,
    }
    row["ok"] = (
        row["to_cp"] <= DIRECTIONS[name].limit
        and row["cpu_s_per_gb"] <= LEAST_CPU
        and row["peak_mib"] * MIB <= LEAST_PEAK
    )
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns."""
    print(f"{'':14}workers  wall s     GB   x cp  x raw  x moved  CPU s/GB  peak MiB")
    for r in rows:
        print(
            f"{r['direction']:14}{r['workers']!s:>7}{r['wall_s']:8.1f}{r['gb_written']:7.2f}"
            f"{r['to_cp']:7.2f}{r['to_raw']:7.2f}{r['to_moved']:9.2f}{r['cpu_s_per_gb']:10.2f}{r['peak_mib']:10.0f}"
            f"  {'ok' if r['ok'] else ''}"
        )


# --- full size, nothing written ------------------------------------------------------------------

NULL = """
import os, sys, tempfile
from pathlib import Path
import torch
from gptoss_convert.blockio import BlockWriter
from gptoss_convert.convert import prepare_import
from gptoss_convert.execute import DEFAULT_MAX_MEMORY, Executor, default_workers, make_budget

def close(writer):
    if writer._fill:
        writer._hand_over()
    writer.abort()

BlockWriter._open = lambda writer: os.open(os.devnull, os.O_WRONLY)
BlockWriter._write = lambda writer, view, offset: None
BlockWriter.close = close
conversion = prepare_import(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    sink = conversion.sink(Path(folder))
    budget = make_budget(sink, int(sys.argv[2]) or default_workers(), DEFAULT_MAX_MEMORY)
    validators = conversion.registry.validators().values()
    Executor(conversion.plan, conversion.source, sink, validators).run(budget)
"""


COMPILE = """
import torch
from gptoss_kernels import mxfp4
mxfp4.decode(*mxfp4.encode(torch.zeros(1, 32, dtype=torch.bfloat16)))
"""


def run_null(bench: Bench, tool: Path, form: str, workers: int) -> int:
    """Import both models into nothing; 1 if their memory differs by more than a tenth."""
    bench.child(COMPILE)  # numba's kernels, if they are not kept from an earlier run
    peaks = {}
    for model in ("20b", "120b"):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            subprocess.run([sys.executable, tool, folder, model, form], check=True)
            run = bench.child(NULL, folder, str(workers))
        peaks[model] = run.peak / MIB
        print(f"{model} {form}: {run.wall:.1f} s, CPU {run.cpu:.1f} s, peak {peaks[model]:.0f} MiB")
    ratio = peaks["120b"] / peaks["20b"]
    result = {"form": form, "peak_mib": peaks, "ratio": round(ratio, 3)}
    print(json.dumps({**result, "load_average": os.getloadavg()[0]}))
    return int(not 0.9 <= ratio <= 1.1)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="0", help="1,2: one run for each; 0: the default")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--folder", type=Path, default=Path("bench-convert"))
    parser.add_argument("--hide-numba", action="store_true", help="as if it were not installed")
    parser.add_argument("--tiny", action="store_true", help="a small width, to try it out")
    parser.add_argument("--null", action="store_true", help="full size, nothing written")
    parser.add_argument("--form", choices=("mxfp4", "bf16"), default="mxfp4", help="with --null")
    parser.add_argument("--sparse-tool", type=Path, help="makes checkpoints of holes; with --null")
    arguments = parser.parse_args()
    if arguments.null and not arguments.sparse_tool:
        parser.error("--null needs --sparse-tool")
    return arguments


def main() -> int:
    """Prepare, check, run the rounds, print."""
    arguments = parse()
    workers = [int(count) for count in arguments.workers.split(",")]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder, hide_numba=arguments.hide_numba)
    if arguments.null:
        return run_null(bench, arguments.sparse_tool, arguments.form, workers[0])
    names = arguments.directions.split(",")
    bench.prepare(names, arguments.layers, TINY if arguments.tiny else {})
    rows = measure(bench, names, arguments.rounds, workers)
    shutil.rmtree(arguments.folder)
    print_table(rows)
    load = os.getloadavg()
    print("load average", *(f"{value:.1f}" for value in load))
    print(json.dumps({"layers": arguments.layers, "rows": rows, "load_average": load[0]}))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
