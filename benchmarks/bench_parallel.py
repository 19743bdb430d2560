"""Two GPUs beside one: whether tensor, pipeline and expert parallelism compute the same, and how fast.

    python benchmarks/bench_parallel.py --folder /dev/shm/parallel
    python benchmarks/bench_parallel.py --tiny --device cpu --folder /tmp/parallel

Makes random checkpoints (``bench_logits.py``): calm ones of full 20B width, as many layers as ``--layers``
says, and a small one, whose answers depend on all that it is made of. Then, on one GPU and on two at (tp, pp, ep) = (2, 1, 1), (1, 2, 1) and (1, 1, 2):

* ``import`` by one process and by two, a GPU each; the files are compared
* ``roundtrip`` in float32: all weights, and the logits against transformers'
* logits against one GPU's, in float32 and bfloat16: relative errors (L2) over all logits; in bfloat16
  their error, which is the distance to the float32 ones, beside the error of transformers' bfloat16
  logits; and distances beside what transformers' two implementations of the experts differ by
* greedy answers of a small model in float32; prefill and decoding at full width
* ten steps of training in float32 (two layers) and bfloat16: losses beside one GPU's; tokens per
  second of ``--rows`` rows a step, memory, and what NCCL moved

Prints one table, and a line of JSON; how far it is goes to stderr. The exit code is 1 if something is not the same, or a goal
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
from bench_logits import CALM, make
from parallel_worker import EXPERTS, FLOAT32_LAYERS, INFERENCE, SIZES, SPEED, THEIRS, VALUES
from safetensors.torch import load_file

from gptoss_plugins.train.architecture import hf_config
from gptoss_plugins.train.config import ModelConfig

LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2)}
SEVERAL = [name for name, sizes in LAYOUTS.items() if math.prod(sizes) > 1]
NEAR, LOSS = 1e-5, 1e-4  # relative error of logits; of losses
NOISE = 1.5  # times transformers'
FASTER, MEMORY = 1.6, 0.65  # of one GPU's
MISMATCH = 3  # exit code of roundtrip, where something does not match
STRONG = {  # by how names end, standard deviations; calm weights answer the same without attention
    "embed_tokens.weight": 1.0,
    "sinks": 1.0,
    "gate_up_proj": 0.5,
    "down_proj": 0.5,
    "bias": 0.5,
    "": 0.15,
}
HERE = Path(__file__).parent


def launch(ranks: int, *command: str, first: int = 0) -> subprocess.Popen[str]:
    """Start a command on so many ranks; one alone takes the GPU ``first``."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    threads = str(max(1, (os.cpu_count() or 1) // (2 * max(2, ranks))))
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
    wanted = "tiny" if args.tiny else "20b"
    sizes = [("hf", wanted, args.layers), ("small-hf", "tiny", 4)]
    if args.layers > FLOAT32_LAYERS:
        sizes.append(("shallow-hf", wanted, FLOAT32_LAYERS))
    for name, size, layers in sizes:
        config = hf_config(ModelConfig(**SIZES[size], num_layers=layers))
        config["quantization_config"] = {"quant_method": "mxfp4"}
        sizes_of = STRONG if name == "small-hf" else CALM
        make(args.folder / name, config, args.device, sizes_of)
    if args.layers <= FLOAT32_LAYERS:
        (args.folder / "shallow-hf").symlink_to("hf")
    if args.device == "cuda":
        torch.cuda.empty_cache()


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


def tell(what: str) -> None:
    """How far it is, with figures: a run that is cut off has not measured for nothing."""
    print(what, file=sys.stderr, flush=True)


def require_even(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End unless two ranks can share each of these."""
    for name in names:
        count = getattr(args, name)
        if count is not None and (count < 2 or count % 2):
            parser.error(
                f"--{name} {count}: give an even number of 2 or more, for two ranks share them"
            )


def require_empty(parser: argparse.ArgumentParser, folder: Path) -> None:
    """End if somebody's files are in the folder: it is removed at the end."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"--folder {folder} is not empty; name a new one, which is removed at the end")


def layout_options(name: str) -> list[str]:
    """As the command line takes them."""
    pairs = zip(("--tp", "--pp", "--ep"), LAYOUTS[name], strict=True)
    return [part for option, count in pairs for part in (option, str(count))]


def worker(name: str, what: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start what a layout's ranks measure; transformers takes the last GPU."""
    folder = ("--folder", str(args.folder), "--device", args.device)
    sizes = ("layers", "length", "rows", "prefill")
    more = [part for size in sizes for part in (f"--{size}", str(getattr(args, size)))]
    more += ["--size", "tiny" if args.tiny else "20b"]
    command = (str(HERE / "parallel_worker.py"), name, what, *layout_options(name), *folder, *more)
    return launch(math.prod(LAYOUTS[name]), *command, first=int(what == THEIRS))


def figures(name: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker found."""
    found: dict[str, Any] = json.loads((args.folder / f"{name}-{what}.json").read_bytes())
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


def values(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is not timed; roundtrips and transformers at the same time, where memory allows that."""
    trips = {name: roundtrip(name, args) for name in SEVERAL}
    output(worker("one", THEIRS, args))
    found = {name: {"roundtrip": what_matched(output(trip))} for name, trip in trips.items()}
    found["one"] = {"theirs": figures("one", THEIRS, args)}
    for name in LAYOUTS:
        output(worker(name, VALUES, args))
        found[name] |= figures(name, VALUES, args)
    return found


def error(args: argparse.Namespace, one: str, two: str) -> float:
    """Relative error of the second's logits; each is a layout's name and a dtype."""
    first, second = (
        load_file(args.folder / f"{name}.safetensors")["logits"].double() for name in (one, two)
    )
    return float((second - first).norm() / first.norm())


def apart(one: list[float], two: list[float]) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def beside(name: str, found: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """A layout's values beside one GPU's and transformers'."""
    own, alone = found[name], found["one"]
    eager, grouped = theirs = [f"transformers-{experts}-bfloat16" for experts in EXPERTS]
    noise = (
        error(args, eager, grouped),
        apart(*(alone["theirs"][f"losses, {experts}"] for experts in EXPERTS)),
    )
    mine, exact = f"{name}-bfloat16", "one-float32"
    near = min(error(args, other, mine) for other in theirs)
    least = min(error(args, exact, other) for other in theirs)
    bfloat16 = apart(alone["training"]["losses"], own["training"]["losses"])
    trip = own.get("roundtrip")
    return {
        "weights": trip and trip["equal"] == trip["tensors"] > 0,
        "greedy": own["greedy"] == alone["greedy"],
        "logits, float32, to transformers": trip and trip["relative_error"],
        "logits, float32, to one": error(args, exact, f"{name}-float32"),
        "losses, float32, to one": apart(alone["losses, float32"], own["losses, float32"]),
        "logits, bfloat16, to transformers, of noise": near / (noise[0] or 1.0),
        "logits, bfloat16, to one, of noise": error(args, "one-bfloat16", mine) / (noise[0] or 1.0),
        "logits, bfloat16, error, of transformers' error": error(args, exact, mine)
        / (least or 1.0),
        "losses, bfloat16, to one, of noise": bfloat16 / (noise[1] or 1.0),
        "noise": noise,
    }


def ratios(own: dict[str, Any], alone: dict[str, Any]) -> dict[str, float]:
    """Of a layout's speed and memory to one GPU's."""
    found = {
        key: rate / alone["inference"][key]
        for key, rate in own["inference"].items()
        if key != "gigabytes"
    }
    if "training" in own:
        mine, theirs = own["training"], alone["training"]
        found["training"] = mine["tokens_per_second"] / theirs["tokens_per_second"]
        found["memory"] = mine["gigabytes"] / (theirs["gigabytes"] or 1.0)
    return found


MOST = {  # None is told, not judged: there one GPU misses what transformers' implementations keep
    "logits, float32, to transformers": NEAR,
    "logits, float32, to one": NEAR,
    "losses, float32, to one": LOSS,
    "logits, bfloat16, error, of transformers' error": NOISE,
    "logits, bfloat16, to one, of noise": NOISE,
    "logits, bfloat16, to transformers, of noise": None,
    "losses, bfloat16, to one, of noise": NOISE,
}


def judged(rows: dict[str, dict[str, Any]], *, timed: bool) -> list[str]:
    """What is not as it should be, of what was measured."""
    wrong = []
    several = {name: rows[name] for name in SEVERAL}
    for name, row in several.items():
        wrong += [f"{name}: {key}" for key in ("weights", "greedy") if not row.get(key, True)]
        for key, most in MOST.items():
            if most is None or (not timed and " of " in key):  # CPUs have next to none
                continue
            if key in row and not (row[key] is not None and row[key] <= most):
                wrong.append(f"{name}: {key} {row[key]}")
    if not timed:
        return wrong
    for key in ("prefill", "training"):
        rates = [row[key] for row in several.values() if key in row]
        if rates and max(rates) < FASTER:
            wrong.append(f"{key} is not {FASTER} times as fast at any layout")
    if min(row.get("memory", 0.0) for row in several.values()) > MEMORY:
        wrong.append(f"no layout takes {MEMORY} of one GPU's memory")
    return wrong


def print_table(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """A column per layout, what was not measured left out; ratios are to one GPU."""
    print(f"{'':48}" + "".join(f"{name:>12}" for name in rows))

    def said(holds: bool | None) -> str | None:
        return None if holds is None else "yes" if holds else "NO"

    def line(title: str, values: list[Any], form: str) -> None:
        if any(value is not None for value in values):
            cells = (f"{'' if value is None else format(value, form):>12}" for value in values)
            print(f"{title:48}" + "".join(cells))

    line("weights equal", [said(r.get("weights")) for r in rows.values()], "s")
    line("greedy answers equal", [said(r.get("greedy")) for r in rows.values()], "s")
    for key in MOST:
        form = ".2f" if " of " in key else ".1e"
        line(key, [row.get(key) for row in rows.values()], form)
    for key in ("prefill", "decoding, batch 1", "decoding, batch 32"):
        line(f"{key}, tokens/s", [found[n]["inference"][key] for n in rows], ",.0f")
        line("", [row[key] for row in rows.values()], ".2f")
    training = [found[name].get("training", {}) for name in rows]
    line("training, tokens/s", [t.get("tokens_per_second") for t in training], ",.0f")
    line("", [row.get("training") for row in rows.values()], ".2f")
    line("MFU", [t.get("mfu") for t in training], ".1%")
    line("training, GB on each GPU", [t.get("gigabytes") for t in training], ".1f")
    line("", [row.get("memory") for row in rows.values()], ".2f")
    line("over the bus in a step, GB", [t.get("bus_gigabytes") for t in training], ".2f")
    line("at, GB/s", [t.get("bus_bandwidth") for t in training], ".0f")


def main() -> int:
    """Make, measure, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of all files; new or empty")
    parser.add_argument("--layers", type=int, default=2, help="even")
    parser.add_argument("--length", type=int, help="tokens of a row that is learned: 4096")
    parser.add_argument("--rows", type=int, default=8, help="of a step; even")
    parser.add_argument("--prefill", type=int, help="tokens of the long prompt: 32768")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--only-inference", action="store_true", help="its speed, after importing; no values"
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to try it out")
    args = parser.parse_args()
    require_even(parser, args, "layers", "rows")
    require_empty(parser, args.folder)
    args.length = args.length or (160 if args.tiny else 4096)
    args.prefill = args.prefill or (640 if args.tiny else 32768)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    prepare(args)
    imported = imports(args)
    tell(f"import by one process and by two: {imported}")
    found = {name: {} for name in LAYOUTS} if args.only_inference else values(args)
    rows: dict[str, Any] = {}
    what = INFERENCE if args.only_inference else SPEED
    for name in LAYOUTS:
        output(worker(name, what, args))
        found[name] |= figures(name, what, args)
        rows[name] = ratios(found[name], found["one"])
        rows[name] |= {} if args.only_inference else beside(name, found, args)
        tell(f"{name}: {json.dumps(rows[name])}\n{json.dumps(found[name])}")
    shutil.rmtree(args.folder)
    print_table(found, rows)
    if "noise" in rows["one"]:
        noise = rows["one"]["noise"]
        print(f"transformers' own noise: logits {noise[0]:.1e}, losses {noise[1]:.1e}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    wrong = judged(rows, timed=args.device == "cuda")
    if not imported["same_files"] or imported["other_files"]:
        wrong.append("files imported by two processes are others than one's")
    print("\n".join(f"not met: {what}" for what in wrong) or "all met")
    print(json.dumps({"device": where, "import": imported, "found": found, "compared": rows}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
