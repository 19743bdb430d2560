"""What first-time users met around MXFP4: figures that hid a loss, options that did nothing, advice
that led nowhere.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert.convert import prepare_export
from gptoss_convert.errors import UsageError
from gptoss_convert.registry import Registry
from gptoss_convert.report import describe_plugins
from gptoss_convert.testing import write_hf_folder

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
KEPT = "iter_0000000/quantization/mxfp4.safetensors"
LARGEST = 1.5 * 2.0**127
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 ``[E, in, out]``, by the definition."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = CODES[codes & 7] * (1 - 2 * (codes > 7).double())
    scaled = torch.ldexp(values, scales.double()[..., None] - 127)
    scaled[scales == 255] = math.nan
    return scaled.flatten(-2).to(torch.bfloat16).transpose(1, 2)


def loaded(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def edited(folder: Path, source: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """The source in one shard, changed."""
    tensors = loaded(source)
    edit(tensors)
    return write_hf_folder(
        folder, json.loads((source / "config.json").read_bytes()), tensors, shards=1
    )


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    return done


def refused(done: subprocess.CompletedProcess[str], code: int, *says: str) -> str:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "internal error" not in done.stderr
    for text in says:
        assert text in done.stderr, done.stderr
    return done.stderr


def encoding(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of GATE_UP, and all of the report."""
    facts = json.loads(ok(done).stdout)["encoding"]
    return next(t for t in facts["tensors"] if t["name"] == GATE_UP), facts


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first-use")


@pytest.fixture(scope="module")
def megatron(work: Path, originals: dict[str, Path]) -> Path:
    """Imported from MXFP4; for reading only."""
    from gptoss_convert.convert import import_checkpoint

    import_checkpoint(originals["mxfp4"], work / "megatron")
    return work / "megatron"


# ---- figures


@pytest.mark.parametrize("rule", ["even", "floor", "round_up"])
@pytest.mark.parametrize("backend", ["table", "numba", "reference"])
def test_finite_weights_stay_finite_and_their_loss_is_told(
    rule: str, backend: str, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[GATE_UP][0] = 3e38

    source = edited(tmp_path / "in", originals["bf16"], enlarge)
    told, _ = encoding(
        invoke(
            "quantize", "--hf-model", source, "--hf-path", tmp_path / "out", "--json",
            "--scale-rule", rule, "--codec-backend", backend,
        )
    )  # fmt: skip
    found = loaded(tmp_path / "out")
    scales = found[GATE_UP + "_scales"]
    back = decoded(found[GATE_UP + "_blocks"], scales)
    assert scales[0].unique().tolist() == [252]
    assert (back[0] == LARGEST).all()
    value = float(loaded(source)[GATE_UP][0, 0, 0])
    assert told["max_error"] == value - LARGEST > 4e37
    assert told["nonfinite"] == 0
    assert told["requantized"] >= scales[0].numel()
    assert told["sqnr_db"] == pytest.approx(20 * math.log10(value / (value - LARGEST)), abs=1e-3)


@pytest.mark.parametrize("policy", ["nan", "saturate"])
def test_what_was_not_finite_is_counted(
    policy: str, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    def fill(tensors: dict[str, Tensor]) -> None:
        tensors[GATE_UP].fill_(math.inf)

    source = edited(tmp_path / "in", originals["bf16"], fill)
    command = ["quantize", "--hf-model", source, "--hf-path", tmp_path / "out", "--overwrite"]
    command += ["--on-nonfinite", policy]
    told, facts = encoding(invoke(*command, "--json"))
    count = loaded(source)[GATE_UP].numel()
    assert told["nonfinite"] == facts["total"]["nonfinite"] == count
    assert (told["kept"], told["max_error"], told["sqnr_db"]) == (0, 0, None)
    text = ok(invoke(*command)).stdout
    (head,) = [line for line in text.splitlines() if line.startswith("tensor ")]
    assert "NaN or inf" in head
    (row,) = [line.split() for line in text.splitlines() if line.startswith(GATE_UP)]
    assert row[4] == f"{count:,}"


def test_what_goes_down_with_a_nan_is_an_error(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[GATE_UP].zero_()
        tensors[GATE_UP][1, 32:64, 5] = 3.0  # one block
        tensors[GATE_UP][1, 40, 5] = math.nan

    source = edited(tmp_path / "in", originals["bf16"], spoil)
    command = ["quantize", "--hf-model", source, "--hf-path", tmp_path / "out", "--json"]
    told, _ = encoding(invoke(*command, "--on-nonfinite", "nan"))
    assert (told["nonfinite"], told["requantized"], told["max_error"]) == (1, 1, 3.0)
    assert told["sqnr_db"] == 0  # all there was is lost
    assert told["rms_error"] == pytest.approx(
        math.sqrt(31 * 9 / (loaded(source)[GATE_UP].numel() - 1))
    )


def test_the_report_of_ordinary_weights_has_no_column_for_them(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    command = ["quantize", "--hf-model", originals["bf16"], "--hf-path"]
    done = ok(invoke(*command, tmp_path / "out", "--scale-rule", "round_up"))
    assert "NaN" not in done.stdout
    assert "rule round_up" in done.stdout
    assert "backend auto" not in done.stdout
    assert "blocks" in done.stdout
    _, facts = encoding(invoke(*command, tmp_path / "again", "--json"))
    assert facts["backend"] in ("numba", "table")
    assert facts["total"]["unit"] == "blocks"
    eight = ok(invoke(*command, tmp_path / "eight", "--codec", "mxfp8"))
    assert "a kept element has" in eight.stdout
    assert "blocks" not in eight.stdout
    _, facts = encoding(invoke(*command, tmp_path / "e", "--codec", "mxfp8", "--json"))
    assert facts["total"]["unit"] == "elements"


@pytest.mark.parametrize("workers", [1, 3])
def test_infinities_that_decoding_makes_are_told(
    workers: int, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    def overflow(tensors: dict[str, Tensor]) -> None:
        blocks, scales = tensors[GATE_UP + "_blocks"], tensors[GATE_UP + "_scales"]
        scales[1, 3, 0], scales[3, 7, 1], scales[4, 2, 1] = 253, 254, 255
        blocks[1, 3, 0] = 0x67  # codes 7 and 6: infinite both
        blocks[3, 7, 1] = 0x43  # codes 3 and 4
        tensors["model.layers.2.mlp.experts.down_proj_scales"][2, 1, 2] = 255

    source = edited(tmp_path / "in", originals["mxfp4"], overflow)
    for command in (
        ["import", "--hf-model", source, "--megatron-path", tmp_path / "mg"],
        ["dequantize", "--hf-model", source, "--hf-path", tmp_path / "out"],
    ):
        lines = ok(invoke(*command, "--workers", workers)).stderr.splitlines()
        assert [line.split(";")[0] for line in lines] == [
            f"{GATE_UP}: decodes to values that are not finite (48 infinite, 32 NaN)",
            "model.layers.2.mlp.experts.down_proj: decodes to values that are not finite (32 NaN)",
        ]
    values = loaded(tmp_path / "out")[GATE_UP]
    assert (int(values.isinf().sum()), int(values.isnan().sum())) == (48, 32)
    quiet = ["dequantize", "--hf-model", originals["mxfp4"], "--hf-path", tmp_path / "quiet"]
    assert ok(invoke(*quiet)).stderr == ""


# ---- advice


def test_advice_on_what_cannot_be_encoded_helps(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    for value, policy, advice in (
        (math.inf, [], "--on-nonfinite nan or saturate\n"),
        (math.nan, [], "--on-nonfinite nan\n"),
        (math.nan, ["--on-nonfinite", "saturate"], "--on-nonfinite nan\n"),
    ):

        def spoil(tensors: dict[str, Tensor], value: float = value) -> None:
            tensors[GATE_UP][2, 9, 3] = value

        source = edited(tmp_path / f"in-{value}-{len(policy)}", originals["bf16"], spoil)
        command = ["quantize", "--hf-model", source, "--hf-path", tmp_path / "out"]
        text = refused(invoke(*command, *policy), 1, f"{GATE_UP}[2]: output 3, inputs 0 to 31 hold")
        assert text.endswith(advice)


def test_scales_that_do_not_fit_are_named_by_their_checkpoint(
    megatron: Path, originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    name = GATE_UP + "_scales"
    missing = edited(tmp_path / "missing", originals["mxfp4"], lambda t: t.__delitem__(name))
    export = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    export += ["--hf-path", tmp_path / "out", "--scales-from"]
    text = refused(invoke(*export, missing), 1, f"error: {missing}: {name}: is not there; ")
    assert "another model" not in text
    square = originals["mxfp4-square"]
    text = refused(invoke(*export, square), 1, f"error: {square}: ", "another model's")
    assert str(megatron) not in text


def test_inspect_looks_at_the_scales_that_were_kept(
    megatron: Path, tmp_path: Path, invoke: Run
) -> None:
    for cut in (1, 10_000):
        folder = Path(shutil.copytree(megatron, tmp_path / f"mg{cut}"))
        data = (folder / KEPT).read_bytes()
        (folder / KEPT).write_bytes(data[: -cut if cut == 1 else 7])
        done = invoke("inspect", folder, "--json")
        assert done.returncode == 1
        (problem,) = json.loads(done.stdout)["problems"]
        export = ["export", "--megatron-path", folder, "--export-dtype", "mxfp4", "--hf-path"]
        text = refused(invoke(*export, tmp_path / f"out{cut}"), 1)
        for advice in (problem, text):
            assert "mxfp4.safetensors" in advice
            assert "--scales-from, or remove it" in advice
            assert "fetch it again" not in advice
        (folder / KEPT).unlink()
        assert ok(invoke("inspect", folder)).stdout.endswith("every tensor is there and fits\n")
        ok(invoke(*export, tmp_path / f"out{cut}"))


def test_overwriting_what_is_no_checkpoint_is_not_advised_twice(
    megatron: Path, tmp_path: Path, invoke: Run
) -> None:
    target = tmp_path / "notes"
    target.mkdir()
    (target / "todo").write_text("keep me")
    export = ["export", "--megatron-path", megatron, "--hf-path", target]
    assert "say --overwrite" in refused(invoke(*export), 1)
    text = refused(invoke(*export, "--overwrite"), 1, "is not empty")
    assert "say --overwrite" not in text


def test_a_codec_that_the_config_contradicts_is_refused(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    command = ["dequantize", "--hf-model", originals["mxfp4"], "--hf-path", tmp_path / "out"]
    text = refused(
        invoke(*command, "--codec", "mxfp8"), 1, "declares", "mxfp4", "leave --codec out"
    )
    assert "does not declare" not in text
    ok(invoke(*command, "--codec", "mxfp4"))


# ---- options that did nothing


def test_export_says_what_codec_is_for(megatron: Path, tmp_path: Path, invoke: Run) -> None:
    for name in ("mxfp4", "nonsense"):
        for command in (["export", "--hf-path", tmp_path / "out"], ["plan"]):
            command += ["--megatron-path", megatron, "--codec", name]
            refused(invoke(*command), 2, f"--export-dtype {name}")
    assert not (tmp_path / "out").exists()
    from gptoss_convert.opening import Choice

    with pytest.raises(UsageError, match="--export-dtype"):
        prepare_export(megatron, choice=Choice(codec="mxfp4"))


@pytest.mark.parametrize(
    ("said", "both"),
    [
        (["--scale-rule", "even", "--codec-option", "rule=floor"], "--scale-rule even and"),
        (["--codec-option", "rule=even", "--codec-option", "rule=floor"], "rule=even and"),
        (["--codec-backend", "table", "--codec-option", "backend=numba"], "--codec-backend table"),
    ],
)
def test_options_that_contradict_each_other(
    said: list[str], both: str, megatron: Path, tmp_path: Path, invoke: Run
) -> None:
    command = ["export", "--megatron-path", megatron, "--export-dtype", "mxfp4"]
    command += ["--hf-path", tmp_path / "out"]
    refused(invoke(*command, *said), 2, both, "contradict")
    same = ["--scale-rule", "floor", "--codec-option", "rule=floor", "--json"]
    assert json.loads(ok(invoke(*command, *same)).stdout)["encoding"]["rule"] == "floor"


def test_one_checkpoint_is_inspected(
    megatron: Path, originals: dict[str, Path], invoke: Run
) -> None:
    for arguments in (
        [megatron, "--hf-model", originals["bf16"]],
        [originals["bf16"], "--megatron-path", megatron],
        ["--hf-model", originals["bf16"], "--megatron-path", megatron],
    ):
        refused(invoke("inspect", *arguments), 2, "give one")


def test_an_empty_name_is_not_this_folder(
    megatron: Path, originals: dict[str, Path], tmp_path: Path, invoke: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(originals["mxfp4"])
    export = ["export", "--megatron-path", megatron, "--hf-path", tmp_path / "out"]
    refused(invoke(*export, "--export-dtype", "mxfp4", "--scales-from", ""), 2, "is empty")
    refused(invoke("import", "--hf-model", " ", "--megatron-path", tmp_path / "mg"), 2, "is empty")


# ---- plan


def obstacles(done: subprocess.CompletedProcess[str]) -> list[str]:
    found: list[str] = json.loads(ok(done).stdout)["obstacles"]
    return found


def test_plan_says_what_would_keep_it_from_running(
    megatron: Path, originals: dict[str, Path], tmp_path: Path, invoke: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from gptoss_convert import staging

    source = Path(shutil.copytree(originals["mxfp4"], tmp_path / "in"))
    plan = ["plan", "--hf-model", source, "--megatron-path"]
    assert obstacles(invoke(*plan, tmp_path / "new", "--json")) == []
    assert "would not run" not in ok(invoke(*plan, tmp_path / "new")).stdout
    (inside,) = obstacles(invoke(*plan, source / "below", "--json"))
    assert "lies in it" in inside
    (taken,) = obstacles(invoke(*plan, megatron, "--json"))
    assert "is not empty" in taken
    assert obstacles(invoke("plan", "--hf-model", source, "--json")) == []
    monkeypatch.setattr(staging, "free_bytes", lambda _: 1000)
    (full,) = obstacles(invoke(*plan, tmp_path / "new", "--json"))
    assert "1.00 kB are free" in full
    text = ok(invoke(*plan, source)).stdout
    assert text.count("would not run: ") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_plan_touches_nothing_of_an_unfinished_replacement(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    (tmp_path / ".new.replaced").mkdir()
    ok(invoke("plan", "--hf-model", originals["bf16"], "--megatron-path", tmp_path / "new"))
    assert [p.name for p in tmp_path.iterdir()] == [".new.replaced"]


def test_plan_quantizes_and_dequantizes(
    originals: dict[str, Path], tmp_path: Path, invoke: Run
) -> None:
    plan = ["plan", "--hf-path", tmp_path / "out", "--json", "--hf-model"]
    facts = json.loads(ok(invoke(*plan, originals["mxfp4"])).stdout)
    assert (facts["direction"], facts["codecs"]) == ("dequantize", ["mxfp4"])
    quantizing = [*plan, originals["bf16"], "--export-dtype", "mxfp4", "--scale-rule", "floor"]
    facts = json.loads(ok(invoke(*quantizing)).stdout)
    assert (facts["direction"], facts["encoding"]["rule"]) == ("quantize", "floor")
    assert facts["target"] == str(tmp_path / "out")
    refused(invoke(*plan, originals["bf16"]), 1, "is not quantized")


@pytest.mark.parametrize(
    ("names", "stray"),
    [
        ("hf", ["--export-dtype", "mxfp4"]),
        ("hf", ["--scale-rule", "even"]),
        ("hf", ["--scales-from", "x"]),
        ("mg", ["--torch-dtype", "bfloat16"]),
        ("mg", ["--no-keep-scales"]),
        ("hf out", ["--export-dtype", "bfloat16"]),
        ("hf out", ["--on-nonfinite", "nan"]),
        ("hf out", ["--export-dtype", "mxfp4", "--torch-dtype", "bfloat16"]),
    ],
)
def test_plan_refuses_what_does_not_apply(
    names: str, stray: list[str], megatron: Path, originals: dict[str, Path], tmp_path: Path,
    invoke: Run,
) -> None:  # fmt: skip
    known = {
        "hf": ["--hf-model", originals["mxfp4"]],
        "mg": ["--megatron-path", megatron],
        "out": ["--hf-path", tmp_path / "out"],
    }
    command = [word for name in names.split() for word in known[name]]
    flag = next(word for word in reversed(stray) if word.startswith("--"))
    flag = flag.replace("--no-", "--[no-]")
    refused(invoke("plan", *command, *stray), 2, flag, "does not go with")


# ---- plugins


def test_plugins_are_listed_where_two_claim_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens to who follows docs/codecs.md and leaves the name."""
    page = Path(__file__).parents[1] / "docs" / "codecs.md"
    text = page.read_text()
    assert text.index("change `NAME` first") < text.index("```python")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    (tmp_path / "pasted_codec.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("mine", "pasted_codec", "gptoss_convert"),
        EntryPoint("mxfp8", "gptoss_plugins.mxfp8", "gptoss_convert"),
        EntryPoint("mxfp4", "gptoss_plugins.mxfp4", "gptoss_convert"),
    ]
    facts = describe_plugins(Registry(points))
    assert {p["name"] for p in facts["plugins"]} == {"mine", "mxfp4", "mxfp8"}
    assert facts["offers"]["codecs"] == ["mxfp4", "mxfp8"]
    (conflict,) = facts["conflicts"]
    for name in ("'mine'", "'mxfp8'", "--no-plugin"):
        assert name in conflict
    assert describe_plugins(Registry(points[1:]))["conflicts"] == []


# ---- demo


def test_demo_as_json(tmp_path: Path, invoke: Run) -> None:
    facts = json.loads(ok(invoke("demo", "--output", tmp_path / "d", "--json")).stdout)
    assert facts["schema"] == "gptoss-convert.demo/1"
    assert facts["tensors"] == 71
    assert all(Path(facts[name]).is_dir() for name in ("openai", "megatron", "huggingface"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_demo_on_a_full_disk_leaves_nothing(disk: Path, invoke: Run) -> None:
    for size in (0, 5_000_000):  # the first checkpoint fits, and does not
        filler = disk.parent / "filler"
        if size:
            filler = disk / "filler"
            filler.write_bytes(bytes(size))
        before = sorted(p.name for p in disk.iterdir())
        text = refused(invoke("demo", "--output", disk / "d"), 4)
        assert text.count("\n") == 1
        assert sorted(p.name for p in disk.iterdir()) == before


def test_written_by_the_library_itself(tmp_path: Path) -> None:
    """The small checkpoints of tests are what safetensors writes, byte for byte."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.uint8)}
    write_hf_folder(tmp_path / "x", {}, tensors, shards=1)
    save_file(tensors, tmp_path / "y")
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (tmp_path / "y").read_bytes()
