"""Two GPUs beside one: whether tensor, pipeline and expert parallelism compute the same, and how fast.

    python benchmarks/bench_parallel.py --folder /dev/shm/parallel
    python benchmarks/bench_parallel.py --tiny --device cpu --folder /tmp/parallel

Makes calm random checkpoints (``bench_logits.py``): full 20B width, as many layers as ``--layers`` says,
and small ones. Then, on one GPU and on two at (tp, pp, ep) = (2, 1, 1), (1, 2, 1) and (1, 1, 2):

* ``import`` by one process and by two, a GPU each; the files are compared
* ``roundtrip`` in float32: all weights, and the logits against transformers'
* logits against one GPU's, in float32 and bfloat16; bfloat16 beside what transformers' own two
  implementations of the experts differ by, relative errors (L2) over all logits
* greedy answers of a small model in float32; prefill and decoding at full width
* ten steps of training in float32 (two layers) and bfloat16: losses beside one GPU's; tokens per
  second of ``--rows`` rows a step, memory, and what NCCL moved

Prints one table; the last line is JSON. The exit code is 1 if something is not the same, or a goal
is missed: prefill and training at the best layout 1.6 times one GPU's, and memory for training at
most 0.65 of it. NCCL's settings stay as they are found.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_logits import make
from parallel_worker import EXPERTS, FLOAT32_LAYERS, SIZES, THEIRS
from safetensors.torch import load_file

from gptoss_plugins.train.architecture import hf_config
from gptoss_plugins.train.config import ModelConfig

LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2)}
SEVERAL = [name for name, sizes in LAYOUTS.items() if math.prod(sizes) > 1]
NEAR, LOSS, NOISE = (
    1e-5,
    1e-4,
    1.5,
)  # relative error of logits; of losses; times transformers' noise
SPEED, MEMORY = 1.6, 0.65  # of one GPU's
MISMATCH = 3  # exit code of roundtrip, where something does not match
HERE = Path(__file__).parent


def launch(ranks: int, *command: str, first: int = 0) -> subprocess.Popen[str]:
    """Start a command on so many ranks; one alone takes the GPU ``first``."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "LOCAL_RANK": str(first)}
    return subprocess.Popen([*start, *command], stdout=subprocess.PIPE, text=True, env=env)


def output(of: subprocess.Popen[str]) -> str:
    """What a command printed; ends the benchmark if it failed."""
    said, _ = of.communicate()
    if of.returncode not in (0, MISMATCH):
        raise SystemExit(f"failed ({of.returncode}): {of.args}")
    return said


def prepare(args: argparse.Namespace) -> None:
    """The checkpoints: ``hf``, of full width; ``shallow-hf``, its first layers; ``small-hf``."""
    shutil.rmtree(args.folder, ignore_errors=True)
    wanted = "tiny" if args.tiny else "20b"
    sizes = [("hf", wanted, args.layers), ("small-hf", "tiny", 4)]
    if args.layers > FLOAT32_LAYERS:
        sizes.append(("shallow-hf", wanted, FLOAT32_LAYERS))
    for name, size, layers in sizes:
        config = hf_config(ModelConfig(**SIZES[size], num_layers=layers))
        config["quantization_config"] = {"quant_method": "mxfp4"}
        make(args.folder / name, config, args.device)
    if args.layers <= FLOAT32_LAYERS:
        (args.folder / "shallow-hf").symlink_to("hf")


def imports(args: argparse.Namespace) -> dict[str, Any]:
    """By one process and by two: seconds of each; whether all files are the same."""
    seconds = []
    for ranks, name in ((1, "megatron"), (2, "megatron-2")):
        started = time.monotonic()
        where = ("--hf-model", str(args.folder / "hf"), "--megatron-path", str(args.folder / name))
        output(launch(ranks, "-m", "gptoss_convert", "import", *where, "--device", args.device))
        seconds.append(time.monotonic() - started)
    one, two = args.folder / "megatron", args.folder / "megatron-2"
    names = [str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()]
    same, *other = filecmp.cmpfiles(one, two, names, shallow=False)
    shutil.rmtree(two, ignore_errors=True)
    return {"seconds": seconds, "same_files": len(same), "other_files": [*other[0], *other[1]]}


def layout_options(name: str) -> list[str]:
    """As the command line takes them."""
    pairs = zip(("--tp", "--pp", "--ep"), LAYOUTS[name], strict=True)
    return [part for option, count in pairs for part in (option, str(count))]


def worker(name: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start what a layout's ranks measure, or transformers on the last GPU."""
    folder = ("--folder", str(args.folder), "--device", args.device)
    sizes = ("layers", "length", "rows", "prefill")
    more = [part for size in sizes for part in (f"--{size}", str(getattr(args, size)))]
    more += ["--size", "tiny" if args.tiny else "20b"]
    options = layout_options(name) if name in LAYOUTS else []
    ranks = math.prod(LAYOUTS.get(name, (1,)))
    command = (str(HERE / "parallel_worker.py"), name, *options, *folder, *more)
    return launch(ranks, *command, first=int(name == THEIRS))


def figures(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker found."""
    found: dict[str, Any] = json.loads((args.folder / f"{name}.json").read_bytes())
    return found


def roundtrip(name: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the command at a layout."""
    both = ("--hf-model", str(args.folder / "hf"), "--megatron-path", str(args.folder / "megatron"))
    how = ("--torch-dtype", "float32", "--device", args.device, "--json")
    command = ("-m", "gptoss_convert", "roundtrip", *both, *layout_options(name), *how)
    return launch(math.prod(LAYOUTS[name]), *command)


def what_matched(said: str) -> dict[str, Any]:
    """In a roundtrip."""
    trip = json.loads(said)
    return {
        "tensors": len(trip["tensors"]),
        "equal": sum(row["match"] for row in trip["tensors"]),
        "relative_error": trip["logits"]["relative_error"],
    }


def error(args: argparse.Namespace, dtype: str, one: str, two: str) -> float:
    """Relative error of the second's logits."""
    first, second = (
        load_file(args.folder / f"{name}-{dtype}.safetensors")["logits"].double()
        for name in (one, two)
    )
    return float((second - first).norm() / first.norm())


def apart(one: list[float], two: list[float]) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def compared(
    name: str, found: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """A layout beside one GPU and transformers."""
    own, alone, theirs = found[name], found["one"], found[THEIRS]
    eager, grouped = (f"transformers-{experts}" for experts in EXPERTS)
    noise = (
        error(args, "bfloat16", eager, grouped),
        apart(*(theirs[f"losses, {experts}"] for experts in EXPERTS)),
    )
    near = min(error(args, "bfloat16", other, name) for other in (eager, grouped))
    bfloat16 = apart(alone["training"]["losses"], own["training"]["losses"])
    trip, trained = own.get("roundtrip"), own["training"]
    return {
        "weights": trip and trip["equal"] == trip["tensors"] > 0,
        "greedy": own["greedy"] == alone["greedy"],
        "logits, float32, to transformers": trip and trip["relative_error"],
        "logits, float32, to one": error(args, "float32", "one", name),
        "losses, float32, to one": apart(alone["losses, float32"], own["losses, float32"]),
        "logits, bfloat16, of noise": near / (noise[0] or 1.0),
        "losses, bfloat16, of noise": bfloat16 / (noise[1] or 1.0),
        "noise": noise,
        **{
            key: rate / alone["inference"][key]
            for key, rate in own["inference"].items()
            if key != "gigabytes"
        },
        "training": trained["tokens_per_second"] / alone["training"]["tokens_per_second"],
        "memory": trained["gigabytes"] / (alone["training"]["gigabytes"] or 1.0),
    }


def judged(rows: dict[str, dict[str, Any]], imported: dict[str, Any], *, timed: bool) -> list[str]:
    """What is not as it should be."""
    wrong = [] if imported["same_files"] and not imported["other_files"] else ["import"]
    for name, row in rows.items():
        if name not in SEVERAL:
            continue
        wrong += [f"{name}: {key}" for key in ("weights", "greedy") if not row[key]]
        for key, most in (
            ("logits, float32, to transformers", NEAR),
            ("logits, float32, to one", NEAR),
            ("losses, float32, to one", LOSS),
            ("logits, bfloat16, of noise", NOISE),
            ("losses, bfloat16, of noise", NOISE),
        ):
            if row[key] is None or not row[key] <= most:
                wrong.append(f"{name}: {key} {row[key]}")
    several = [rows[name] for name in SEVERAL]
    if timed:
        for key in ("prefill", "training"):
            if max(row[key] for row in several) < SPEED:
                wrong.append(f"{key} is not {SPEED} times as fast at any layout")
        if min(row["memory"] for row in several) > MEMORY:
            wrong.append(f"no layout takes {MEMORY} of one GPU's memory")
    return wrong


def print_table(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """A column per layout; ratios are to one GPU."""
    print(f"{'':36}" + "".join(f"{name:>14}" for name in rows))

    def said(holds: bool | None) -> str:
        return "" if holds is None else "yes" if holds else "NO"

    def line(title: str, values: list[Any], form: str) -> None:
        cells = (f"{'' if value is None else format(value, form):>14}" for value in values)
        print(f"{title:36}" + "".join(cells))

    line("weights equal", [said(r["weights"]) for r in rows.values()], "s")
    line("greedy answers equal", [said(r["greedy"]) for r in rows.values()], "s")
    for key in (
        "logits, float32, to transformers",
        "logits, float32, to one",
        "losses, float32, to one",
    ):
        line(key, [row[key] for row in rows.values()], ".1e")
    for key in ("logits, bfloat16, of noise", "losses, bfloat16, of noise"):
        line(key, [row[key] for row in rows.values()], ".2f")
    for key in ("prefill", "decoding, batch 1", "decoding, batch 32"):
        line(f"{key}, tokens/s", [found[n]["inference"][key] for n in rows], ",.0f")
        line("", [row[key] for row in rows.values()], ".2f")
    training = [found[name]["training"] for name in rows]
    line("training, tokens/s", [t["tokens_per_second"] for t in training], ",.0f")
    line("", [row["training"] for row in rows.values()], ".2f")
    line("MFU", [t["mfu"] for t in training], ".1%")
    line("training, GB on each GPU", [t["gigabytes"] for t in training], ".1f")
    line("", [row["memory"] for row in rows.values()], ".2f")
    line("over the bus in a step, GB", [t.get("bus_gigabytes") for t in training], ".2f")
    line("at, GB/s", [t.get("bus_bandwidth") for t in training], ".0f")


def main() -> int:
    """Make, measure, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of all files; emptied")
    parser.add_argument("--layers", type=int, default=2, help="even")
    parser.add_argument("--length", type=int, help="tokens of a row that is learned: 4096")
    parser.add_argument("--rows", type=int, default=8, help="of a step; even")
    parser.add_argument("--prefill", type=int, help="tokens of the long prompt: 8192")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to try it out")
    args = parser.parse_args()
    args.length = args.length or (160 if args.tiny else 4096)
    args.prefill = args.prefill or (640 if args.tiny else 8192)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    prepare(args)
    imported = imports(args)
    print(f"import by one process and by two: {imported}", flush=True)
    untimed = [roundtrip(name, args) for name in SEVERAL] + [worker(THEIRS, args)]
    *trips, _ = (output(one) for one in untimed)
    found: dict[str, Any] = {THEIRS: figures(THEIRS, args)}
    rows: dict[str, Any] = {}
    for name in LAYOUTS:
        output(worker(name, args))
        found[name] = figures(name, args)
        if name in SEVERAL:
            found[name]["roundtrip"] = what_matched(trips[SEVERAL.index(name)])
        rows[name] = compared(name, found, args)
        print(f"{name}: {json.dumps(rows[name])}\n{json.dumps(found[name])}", flush=True)
    shutil.rmtree(args.folder)
    print_table(found, rows)
    noise = rows["one"]["noise"]
    print(f"transformers' own noise: logits {noise[0]:.1e}, losses {noise[1]:.1e}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    wrong = judged(rows, imported, timed=args.device == "cuda")
    print("\n".join(f"not met: {what}" for what in wrong) or "all met")
    print(json.dumps({"device": where, "import": imported, "found": found, "compared": rows}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
