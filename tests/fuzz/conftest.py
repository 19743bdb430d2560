"""Small checkpoints of every form, commands to try on them once damaged, and what must hold then."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings

SECONDS = float(
    os.environ.get("GPTOSS_FUZZ_SECONDS", "0")
)  # for each target; 0 is CI's fixed number
SIZES = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
PATIENCE = 30  # seconds; a good run takes half of one, alone on its machine
# What may stand on stderr beside the one sentence.
_WARNING = re.compile(
    r"rounding|widening|the source is not quantized|config\.json is made|what |too much|.*is not needed"
    r"|.*decodes to values that are not finite"
)


@dataclass(frozen=True)
class Ended:
    """How a command went.

    Attributes:
        code: its exit code, negative for a signal; -9 also if it took too long.
        seconds: it took.
        events: what it did that no command may do to a stranger's checkpoint.
        changed: paths that it made, renamed or removed.

    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    events: tuple[str, ...]
    changed: tuple[str, ...]


class Jail:
    """Talks to the server."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("jail.py")), self._log.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *argv: object) -> Ended:
        """Run ``gptoss-convert`` with these arguments."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(a) for a in argv]) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, f"the server died ({self._server.wait(60)})"
        answer = json.loads(line)
        told = [json.loads(e) for e in self._read("events").splitlines()]
        return Ended(
            answer["code"],
            self._read("out"),
            self._read("err"),
            answer["seconds"],
            tuple(what for kind, what in told if kind == "forbidden"),
            tuple(what for kind, what in told if kind == "changed"),
        )

    def _read(self, name: str) -> str:
        return (Path(self._log.name) / name).read_text(errors="backslashreplace")

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=60)
        self._log.cleanup()


@pytest.fixture(scope="session")
def jail() -> Iterator[Jail]:
    """Runs commands; see jail.py."""
    found = Jail()
    yield found
    found.close()


@pytest.fixture(scope="session")
def forms(write_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every form, by name; for reading only."""
    from gptoss_convert.convert import import_checkpoint
    from gptoss_convert.layout import Layout
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.adapter.bases import model_of
    from gptoss_plugins.adapter.opening import open_adapter
    from gptoss_plugins.adapter.writing import prepare_adapter_import

    folder = tmp_path_factory.mktemp("forms")
    write_tiny(folder / "hf", **SIZES)
    write_tiny(folder / "mxfp4", mxfp4=True, **SIZES)
    import_checkpoint(folder / "mxfp4", folder / "torch_dist")
    layout, choice = Layout(tp=2), Choice(format="torch")
    import_checkpoint(folder / "hf", folder / "torch", layout=layout, choice=choice)
    write_peft(folder / "peft", json.loads((folder / "hf/config.json").read_text()))
    registry, named = default_registry(), {"hf_model": str(folder / "hf"), "hf_revision": None}
    model = model_of(registry, Choice(), megatron_path=None, **named)
    adapter = open_adapter(folder / "peft", model.family, model.config, registry, "hf")
    file = folder / "hf/config.json"
    prepare_adapter_import(adapter, model.family, model.config, registry, config_file=file).run(
        folder / "adapter"
    )
    return {path.name: path for path in sorted(folder.iterdir())}


def write_peft(folder: Path, config: dict[str, Any]) -> None:
    """An adapter of rank 2 on q, o and the experts' down projections, whose names and shapes are PEFT's."""
    import torch
    from safetensors.torch import save_file

    rank, experts, hidden = 2, config["num_local_experts"], config["hidden_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (heads, hidden, 1),
        "self_attn.o_proj": (hidden, heads, 1),
        "mlp.experts": (hidden, config["intermediate_size"], experts),
    }
    noise, found = torch.Generator().manual_seed(3), {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, inputs, count) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora_"
            found[name + "A.weight"] = torch.randn(rank * count, inputs, generator=noise)
            found[name + "B.weight"] = torch.randn(rows, rank * count, generator=noise)
    folder.mkdir()
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"o_proj": 5},
        "use_rslora": False,
        "layers_to_transform": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def commands(form: str, source: Path, target: Path, base: Path) -> list[list[Any]]:
    """Every command that reads a checkpoint of this form, as text and as JSON; ``base`` is an adapter's."""
    if form in ("peft", "adapter"):
        flags = ("--adapter", source, "--hf-model", base)
        way = "import" if form == "peft" else "export"
        every: list[list[Any]] = [
            ["adapter", way, *flags, "--output", target],
            ["adapter", "merge", *flags, "--hf-path", target],
            ["adapter", "merge", *flags, "--output", target],
            ["inspect", source],
            ["verify", source],
            ["verify", base, base, "--adapter", source],
        ]
        return [[*command, *json_] for command in every for json_ in ((), ("--json",))]
    if form in ("hf", "mxfp4"):
        flags = ("--hf-model", source)
        recode = "quantize" if form == "hf" else "dequantize"
        made = [
            ["import", *flags, "--megatron-path", target],
            ["import", *flags, "--megatron-path", target, "--format", "torch", "--tp", 2],
            [recode, *flags, "--hf-path", target],
        ]
    else:
        flags = ("--megatron-path", source)
        made = [
            ["export", *flags, "--hf-path", target],
            ["export", *flags, "--hf-path", target, "--export-dtype", "mxfp4"],
            ["reshard", *flags, "--output", target],
            ["reshard", *flags, "--output", target, "--format", "torch", "--no-optimizer"],
        ]
    every = [["inspect", source], ["plan", *flags], *made]
    return [[*command, *json_] for command in every for json_ in ((), ("--json",))]


def everything(folder: Path) -> dict[str, tuple[int, ...]]:
    """All below a folder, by name: kind, and for what is no folder size and time of change.

    Looked at only, since a file may be a pipe, or a terabyte long.
    """
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            facts = os.lstat(path)
            is_folder = stat.S_ISDIR(facts.st_mode)
            found[path] = (
                facts.st_mode,
                *(() if is_folder else (facts.st_size, facts.st_mtime_ns)),
            )
    return found


def wrong_with(ended: Ended, command: list[Any]) -> list[str]:
    """What is wrong with how a command went, whatever it was given."""
    found = []
    if ended.code not in (0, 1, 2, 3, 4):
        found.append(f"ended with {ended.code}")
    if ended.seconds > PATIENCE:
        found.append(f"took {ended.seconds:.0f} s")
    if "Traceback" in ended.stderr or "internal error" in ended.stderr:
        found.append("lost its countenance")
    lines = [line for line in ended.stderr.splitlines() if not _WARNING.match(line)]
    told = command[0] in ("inspect", "verify") and ended.stdout
    if ended.code and not told:
        if not lines or not lines[0].startswith("error: "):
            found.append("does not say what is wrong")
        elif len(lines) > 1 and not lines[0].endswith("problems"):
            found.append("says more than a sentence")
        elif len(lines) == 1 and "; " not in lines[0]:
            found.append("does not say what to do")
    if len(ended.stderr) > 50_000:
        found.append("goes on and on")
    if "--json" in command and ended.stdout:
        json.loads(ended.stdout)
    return found + [f"did {event}" for event in ended.events]


Try = Callable[..., list[Ended]]


@pytest.fixture
def attempt(jail: Jail, forms: dict[str, Path], tmp_path: Path) -> Try:
    """Run commands on a damaged checkpoint, and hold what they do against all that is allowed.

    All that ``which`` lets through; of those one in five if a ``turn`` is given, others each turn.
    """

    def run(
        form: str,
        source: Path,
        which: Callable[[list[Any]], bool] = lambda command: True,
        turn: int | None = None,
    ) -> list[Ended]:
        target, before = source.parent / "target", everything(tmp_path)
        every = commands(form, source, target, forms["hf"])
        chosen, done = list(filter(which, every)), []
        for command in chosen if turn is None else chosen[turn % 5 :: 5]:
            ended = jail(*command)
            wrong = wrong_with(ended, command)
            if ended.code == 0 and target.exists():
                shutil.rmtree(target)
            if (after := everything(tmp_path)) != before:
                wrong.append(f"changed {sorted(after.keys() ^ before.keys())[:3]}")
            home = str(tmp_path)
            if stray := [p for p in ended.changed if p.startswith("/") and not p.startswith(home)]:
                wrong.append(f"wrote to {stray[:3]}")
            assert not wrong, f"{' '.join(map(str, command))}\n{wrong}\n{ended.stderr[-2000:]}"
            done.append(ended)
        return done

    return run


@pytest.fixture
def fuzz() -> Callable[[Callable[[], Any], int], None]:
    """Run a hypothesis test: always the same few examples, or new ones for GPTOSS_FUZZ_SECONDS."""

    def run(test: Any, examples: int) -> None:
        how = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=not SECONDS,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, *([Phase.shrink] if SECONDS else [])],
        )
        tried, until = how(test), time.monotonic() + SECONDS
        if not SECONDS:
            tried()
        while time.monotonic() < until:
            seed(random.randrange(1 << 64))(tried)()

    return run
