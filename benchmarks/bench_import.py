"""Import of a slice of GPT-OSS at full 20B width: wall time and memory, beside ``cp`` and the disk.

    python benchmarks/bench_import.py --layers 4 --rounds 3 --folder /some/disk

Makes an MXFP4 checkpoint of random values (4.2 GB for 4 layers), then in every round, in turn:

* ``import``: gptoss-convert to torch_dist, a process of its own
* ``cp``: copy the output's files with cp, and sync
* ``write``: the output's number of bytes written from memory with direct I/O: the disk's limit

Inputs are dropped from the page cache before each. Prints one line per round, then medians of the
ratios, then a JSON line. Exit code 1 if the import was slower than cp or took 700 MiB or more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gptoss_convert.blockio import SLOT, BlockWriter
from gptoss_convert.testing import hf_specs
from gptoss_plugins.gptoss import gptoss_convert_models

MOST_MEMORY = 700 << 20
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
    "quantization_config": {"quant_method": "mxfp4"},
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


def make_checkpoint(folder: Path, layers: int) -> None:
    """One safetensors file of random values, written without holding a tensor."""
    kinds = ["sliding_attention", "full_attention"] * layers
    config = {**CONFIG, "num_hidden_layers": layers, "layer_types": kinds[:layers]}
    table, end = {}, 0
    for name, dtype, shape, nbytes in _stored(config):
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True)
    writer = BlockWriter(folder / "model.safetensors", 8 + len(header) + end)
    writer.append_bytes(len(header).to_bytes(8, "little") + header)
    weights = (torch.randn(SLOT // 2) * 0.02).bfloat16().view(torch.uint8)
    codes = torch.randint(256, (SLOT,), dtype=torch.uint8)
    scales = torch.randint(116, 124, (SLOT,), dtype=torch.uint8)
    for name, _, _, nbytes in _stored(config):
        pool = (
            codes if name.endswith("_blocks") else scales if name.endswith("_scales") else weights
        )
        for start in range(0, nbytes, SLOT):
            writer.append(pool[: min(SLOT, nbytes - start)])
    writer.close()
    (folder / "config.json").write_text(json.dumps(config))


def _stored(config: dict[str, object]) -> Iterator[tuple[str, str, list[int], int]]:
    (family,) = gptoss_convert_models()
    for name, spec in hf_specs(family, config).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = spec.shape
            blocks = experts * rows * inner // 32
            yield name + "_blocks", "U8", [experts, rows, inner // 32, 16], blocks * 16
            yield name + "_scales", "U8", [experts, rows, inner // 32], blocks
        else:
            yield name, spec.dtype, list(spec.shape), spec.nbytes


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_import(source: Path, target: Path) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds, peak resident bytes of one import."""
    command = [sys.executable, "-m", "gptoss_convert", "import", "--no-progress"]
    command += ["--hf-model", str(source), "--megatron-path", str(target)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the import failed")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def timed(action: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def copy(source: Path, target: Path) -> None:
    """cp, and everything on the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()


def write(path: Path, nbytes: int) -> None:
    """As many bytes from memory, by direct I/O."""
    writer = BlockWriter(path, nbytes)
    block = torch.randint(256, (SLOT,), dtype=torch.uint8)
    for start in range(0, nbytes, SLOT):
        writer.append(block[: min(SLOT, nbytes - start)])
    writer.close()


def main() -> int:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-import"))
    arguments = parser.parse_args()
    source, target, copied = (arguments.folder / n for n in ("hf", "megatron", "copy"))
    make_checkpoint(source, arguments.layers)
    rounds = []
    for number in range(1, arguments.rounds + 1):
        forget(source)
        wall, cpu, peak = run_import(source, target)
        nbytes = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
        forget(target)
        copying = timed(lambda: copy(target, copied))
        shutil.rmtree(copied)
        shutil.rmtree(target)
        floor = timed(lambda n=nbytes: write(arguments.folder / "floor", n))
        (arguments.folder / "floor").unlink()
        rounds.append((wall / copying, wall / floor, peak, cpu / nbytes * 1e9))
        print(
            f"round {number}: import {wall:.1f} s, cp {copying:.1f} s, write {floor:.1f} s for "
            f"{nbytes / 1e9:.2f} GB; import/cp {wall / copying:.2f}, import/write "
            f"{wall / floor:.2f}, peak {peak / 2**20:.0f} MiB, CPU {cpu / nbytes * 1e9:.2f} s/GB",
            flush=True,
        )
    shutil.rmtree(arguments.folder)
    to_copy, to_write, peaks, cpus = (list(column) for column in zip(*rounds, strict=True))
    result = {
        "layers": arguments.layers,
        "import_over_cp": round(statistics.median(to_copy), 3),
        "import_over_write": round(statistics.median(to_write), 3),
        "peak_mib": round(max(peaks) / 2**20),
        "cpu_s_per_gb": round(statistics.median(cpus), 2),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result))
    return int(result["import_over_cp"] > 1 or max(peaks) >= MOST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
