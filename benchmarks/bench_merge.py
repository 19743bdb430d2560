"""``adapter merge`` at full 20B width: time, CPU and memory, beside the same conversion without it.

    python benchmarks/bench_merge.py --layers 4 --rounds 3 --folder /some/disk/bench
    python benchmarks/bench_merge.py --directions mxfp4-bf16 --rank 8

Makes a checkpoint of random values and an adapter as PEFT saves it, on attention and on every
expert. In every round and for every direction, one after the other: the plain conversion, and
``adapter merge``. What is read is dropped from the page cache before each. Prints medians; ratios
are of one round. ``ok`` is left out where a limit is passed, and the exit code is then 1; the last
line is JSON. 4 layers take 40 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_convert import CONVERT, MIB, TINY, Bench, Run, forget, make_checkpoint
from safetensors.torch import save_file

from gptoss_plugins.adapter.table import Target, lines, rules
from gptoss_plugins.gptoss import gptoss_convert_models

MOST_TIMES = 2.0  # of the plain conversion's wall time
MOST_PEAK = 700 * MIB


class Direction(NamedTuple):
    """A plain conversion, the folder it reads, and the merge that does the same with an adapter."""

    plain: tuple[str, ...]
    source: str
    merge: tuple[str, ...]


TO_MEGATRON = ("--hf-model", "--output")
DIRECTIONS = {
    "mxfp4-megatron": Direction(("import", "--hf-model", "--megatron-path"), "mxfp4", TO_MEGATRON),
    "mxfp4-bf16": Direction(
        ("dequantize", "--hf-model", "--hf-path"), "mxfp4", ("--hf-model", "--hf-path")
    ),
    "megatron-megatron": Direction(
        ("reshard", "--megatron-path", "--output"), "megatron", ("--megatron-path", "--output")
    ),
    "bf16-mxfp4": Direction(
        ("quantize", "--hf-model", "--hf-path"),
        "bf16",
        ("--hf-model", "--hf-path", "--export-dtype", "mxfp4"),
    ),
}


def make_adapter(folder: Path, base: Path, rank: int) -> None:
    """A and B of every target and layer, random, under the names that PEFT gives them."""
    config = json.loads((base / "config.json").read_text())
    (family,) = gptoss_convert_models()
    every = lines(family, config)
    ranks = [() if line.experts or len(line.parts) == 1 else (rank,) * 3 for line in every]
    targets = [Target(line, sum(r) or rank, r) for line, r in zip(every, ranks, strict=True)]
    tensors = {
        name.format(L=layer): torch.randn(shape) * 0.02
        for rule in rules(targets)
        for name, shape in rule.hf.items()
        for layer in range(config["num_hidden_layers"])
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    parts = [part.rpartition("}.")[2] for line in every for part in line.parts if not line.experts]
    experts = [p.rpartition("}.")[2] for line in every for p in line.parts if line.experts]
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": [part.rpartition(".")[2] for part in parts],
                "target_parameters": experts,
            }
        )
    )


def prepare(bench: Bench, names: list[str], layers: int, sizes: dict[str, int], rank: int) -> None:
    """Make what the directions read."""
    needs = {DIRECTIONS[name].source for name in names} | {"mxfp4"}
    for form in needs & {"mxfp4", "bf16"}:
        make_checkpoint(bench.folder / form, form, layers, sizes)
    if "megatron" in needs:
        run(bench, DIRECTIONS["mxfp4-megatron"].plain, "mxfp4", bench.folder / "megatron")
    make_adapter(bench.folder / "adapter", bench.folder / "mxfp4", rank)


def run(bench: Bench, command: tuple[str, ...], source: str, target: Path) -> Run:
    """One command, after its input was dropped from the page cache."""
    name, give, take, *more = command
    shutil.rmtree(target, ignore_errors=True)
    read = bench.folder / source
    forget(read)
    arguments = [*name.split(), give, str(read), take, str(target), *more, "--no-progress"]
    return bench.child(CONVERT, *arguments)


def measure(bench: Bench, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """All rounds, each with every direction in turn; a row per direction."""
    found: dict[str, list[tuple[Run, Run]]] = {name: [] for name in names}
    made, adapter = bench.folder / "made", ("--adapter", str(bench.folder / "adapter"))
    for number in range(1, rounds + 1):
        for name in names:
            way = DIRECTIONS[name]
            plain = run(bench, way.plain, way.source, made)
            merged = run(bench, ("adapter merge", *way.merge, *adapter), way.source, made)
            found[name].append((plain, merged))
            print(
                f"round {number} {name}: {plain.wall:.1f} s, merged {merged.wall:.1f} s", flush=True
            )
    shutil.rmtree(made)
    return [row_of(name, pairs) for name, pairs in found.items()]


def row_of(name: str, pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """Medians of the rounds, the highest peak, and whether the limits hold."""
    row: dict[str, Any] = {
        "direction": name,
        "plain_s": statistics.median(plain.wall for plain, _ in pairs),
        "merged_s": statistics.median(merged.wall for _, merged in pairs),
        "ratio": statistics.median(merged.wall / plain.wall for plain, merged in pairs),
        "plain_cpu_s": statistics.median(plain.cpu for plain, _ in pairs),
        "merged_cpu_s": statistics.median(merged.cpu for _, merged in pairs),
        "plain_mib": max(plain.peak for plain, _ in pairs) / MIB,
        "merged_mib": max(merged.peak for _, merged in pairs) / MIB,
    }
    row["ok"] = row["ratio"] <= MOST_TIMES and row["merged_mib"] * MIB <= MOST_PEAK
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns."""
    print(f"{'':18} plain s merged s     x  CPU s  merged  MiB  merged")
    for r in rows:
        print(
            f"{r['direction']:18}{r['plain_s']:8.1f}{r['merged_s']:9.1f}{r['ratio']:6.2f}"
            f"{r['plain_cpu_s']:7.1f}{r['merged_cpu_s']:8.1f}{r['plain_mib']:5.0f}"
            f"{r['merged_mib']:8.0f}  {'ok' if r['ok'] else ''}"
        )


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"))
    parser.add_argument("--tiny", action="store_true", help="a small width, to try it out")
    return parser.parse_args()


def main() -> int:
    """Prepare, run the rounds, print."""
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder, hide_numba=False)
    names = arguments.directions.split(",")
    prepare(bench, names, arguments.layers, TINY if arguments.tiny else {}, arguments.rank)
    rows = measure(bench, names, arguments.rounds)
    shutil.rmtree(arguments.folder)
    print_table(rows)
    print(json.dumps({"layers": arguments.layers, "rank": arguments.rank, "rows": rows}))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
