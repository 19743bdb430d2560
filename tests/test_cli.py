"""The command line: flags, output, and what stays unimported. Bad input has a file of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from gptoss_convert.cli import main
from gptoss_convert.options import Bytes
from gptoss_convert.program import Program
from gptoss_plugins.demo import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    make_checkpoint(root / "hf", seed=1)
    done = run("import", "--hf-model", root / "hf", "--megatron-path", root / "mg")
    assert done.exit_code == 0, done.stderr
    return root


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_import_reports_one_line_and_underscores_are_dashes(folders: Path, tmp_path: Path) -> None:
    done = run(
        "import", "--hf_model_id", folders / "hf", "--megatron_path", tmp_path / "m",
        "--trust_remote_code", "--torch_dtype", "float32", "--max_memory", "512MiB",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("imported gpt-oss: 6,293,072 parameters, ")
    assert line.endswith(f" to {tmp_path / 'm'}")


def test_export_takes_the_users_flags(folders: Path, tmp_path: Path) -> None:
    done = run(
        "export", "--hf-model", folders / "hf", "--megatron-load-path", folders / "mg/iter_0000000",
        "--hf-path", tmp_path / "h", "--export-dtype", "bf16", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "gptoss-convert.result/1"
    assert result["direction"] == "export"
    assert result["bytes_out"] == 2 * result["parameters"]
    assert result["resumed"] is False


def test_plan_from_headers_alone(folders: Path, tmp_path: Path) -> None:
    """Shards cut off right behind their headers are enough to plan, and not enough to import."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (folders / "hf").iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        (bare / path.name).write_bytes(data)
    facts = json.loads(run("plan", "--hf-model", bare, "--json").stdout)
    whole = json.loads(run("plan", "--hf-model", folders / "hf", "--json").stdout)
    for name in ("parameters", "bytes_in", "bytes_out", "disk_needed", "steps", "memory_peak"):
        assert facts[name] == whole[name], name
    written = sum(p.stat().st_size for p in (folders / "mg").rglob("*") if p.is_file())
    assert written <= facts["disk_needed"] <= 1.1 * written
    failed = run("import", "--hf-model", bare, "--megatron-path", tmp_path / "m")
    assert failed.exit_code == 1
    assert "is cut short" in failed.stderr


def test_plan_table_names_the_steps_of_one_layer(folders: Path) -> None:
    text = run("plan", "--hf-model", folders / "hf", "--megatron-path", "x/y/z").stdout
    assert "import of gpt-oss to torch_dist" in text
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in text
    assert "decoder.layers.1." not in text
    assert "Layers 1 to 3 are converted like layer 0." in text


def test_plan_of_an_export(folders: Path) -> None:
    facts = json.loads(run("plan", "--megatron-path", folders / "mg", "--json").stdout)
    assert facts["direction"] == "export"
    assert facts["parameters"] == 6_293_072
    assert run("plan").exit_code == 2


@pytest.mark.parametrize("name", ["hf", "mg", "mg/iter_0000000"])
def test_inspect_any_checkpoint(folders: Path, name: str) -> None:
    facts = json.loads(run("inspect", folders / name, "--json").stdout)
    assert facts["problems"] == []
    assert facts["parameters"] == 6_293_072
    assert facts["format"] == ("huggingface" if name == "hf" else "torch_dist")
    table = run("inspect", folders / name)
    assert table.exit_code == 0
    assert "complete: every tensor is there and fits" in table.stdout


def test_inspect_says_what_is_missing(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_checkpoint(tmp_path / "b", seed=2) and tmp_path / "b"
    file = broken / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    gone = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != gone}, file)
    done = run("inspect", broken)
    assert done.exit_code == 1
    assert gone in done.stderr + done.stdout


def test_light_commands_import_no_torch(folders: Path) -> None:
    """So that --help answers at once and a 120B plan takes less than a second."""
    code = (
        "import sys; from click.testing import CliRunner; from gptoss_convert.cli import main\n"
        "done = CliRunner().invoke(main, sys.argv[1:]); assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'triton', 'transformers', 'megatron', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    for arguments in (
        ["--help"],
        ["import", "--help"],
        ["plugins"],
        ["plan", "--hf-model", str(folders / "hf")],
        ["plan", "--megatron-path", str(folders / "mg")],
        ["inspect", str(folders / "mg")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1gib", 2**30),
        ("512M", 512_000_000),
        ("2 kB", 2000),
        ("77", 77),
        ("1.5K", 1500),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "x", "-1GB", "0", "1XB", "inf"])
def test_sizes_that_are_none(text: str) -> None:
    failed = run("plan", "--hf-model", "x", "--max-memory", text)
    assert failed.exit_code == 2
    assert "is no size" in failed.stderr


def test_demo(tmp_path: Path) -> None:
    done = run("demo", "--output", tmp_path / "d")
    assert done.exit_code == 0, done.stderr
    assert "71 of 71 tensors are equal" in done.stdout
    again = run("demo", "--output", tmp_path / "d", "--seed", "5")
    assert again.exit_code == 0, again.stderr
    (tmp_path / "models/openai").mkdir(parents=True)
    (tmp_path / "models/openai/mine.txt").write_text("keep me")
    refused = run("demo", "--output", tmp_path / "models")
    assert refused.exit_code == 1
    assert "is not empty, and no demo's" in refused.stderr
    assert (tmp_path / "models/openai/mine.txt").read_text() == "keep me"


def test_too_little_memory_is_no_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    """torch's own error, of an allocation that no machine can make."""

    @click.group(cls=Program, invoke_without_command=True)
    def greedy() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as ended:
        greedy.main([], "greedy")
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory")
    assert len(said.splitlines()) == 1
