"""Tiny GPT-OSS checkpoints in the form OpenAI publishes, and two ways to run the command line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch

from gptoss_convert.registry import default_registry
from gptoss_convert.testing import distinct, hf_specs, write_hf_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

# A gate that a script starts with & has this signal ignored, and so would all that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The published config.json, its sizes apart: those are small, and no two are alike.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 127,
    "experts_per_token": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "output_router_logits": False,
    "pad_token_id": 126,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 131,
}
MXFP4: dict[str, Any] = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
# Bytes that no parser and no text mode would hand on unchanged.
COMPANIONS: dict[str, bytes] = {
    "tokenizer.json": b'{"version": "1.0"}\r\n' + random.Random(1).randbytes(3001),
    "tokenizer_config.json": b'{"model_max_length": 1e30 }\r\n\r\n',
    "special_tokens_map.json": '{"eos_token": "<|returné|>"}'.encode("utf-16"),
    "generation_config.json": b'{\n "eos_token_id": [127, 126],  "do_sample":true}',
    "chat_template.jinja": b"{# \xff\x00\xfe #}\r{{ messages }}" + random.Random(2).randbytes(777),
}


def tiny_config(*, mxfp4: bool = False, square: bool = False, **changes: Any) -> dict[str, Any]:
    """A published config.json of small sizes.

    Args:
        mxfp4: declare the experts as quantized.
        square: make the intermediate size equal to the hidden size, as in both released models.
        changes: further fields.

    """
    config = {**CONFIG, **({"quantization_config": MXFP4} if mxfp4 else {})}
    if square:
        config["intermediate_size"] = config["hidden_size"]
    return json.loads(json.dumps({**config, **changes}))


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """All tensors in the form the config declares; every code and scales of 2^-17 to 2^-3."""
    family = default_registry().models()["gpt-oss"]
    tensors: dict[str, Tensor] = {}
    for number, (name, spec) in enumerate(hf_specs(family, config).items()):
        noise = torch.Generator().manual_seed(1000 * seed + number)
        if "quantization_config" in config and name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = spec.shape
            shape = (experts, rows, inner // 32)
            codes = torch.randint(256, (*shape, 16), generator=noise, dtype=torch.uint8)
            scales = torch.randint(110, 125, shape, generator=noise, dtype=torch.uint8)
            tensors |= {name + "_blocks": codes, name + "_scales": scales}
        else:
            tensors[name] = distinct(spec, 1000 * seed + number)
    return tensors


class WriteTiny(Protocol):
    """Write a tiny checkpoint; see :func:`write_tiny`."""

    def __call__(self, folder: Path, *, shards: int = 3, seed: int = 0, **options: Any) -> Path:
        """Options as for tiny_config."""


def _write_tiny(folder: Path, *, shards: int = 3, seed: int = 0, **options: Any) -> Path:
    config = tiny_config(**options)
    return write_hf_folder(
        folder, config, tiny_tensors(config, seed), shards=shards, files=COMPANIONS
    )


@pytest.fixture(scope="session")
def write_tiny() -> WriteTiny:
    """Write a tiny Hugging Face checkpoint, companions and all, into a new folder."""
    return _write_tiny


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each form, by name; for reading only."""
    folder = tmp_path_factory.mktemp("originals")
    forms: dict[str, dict[str, Any]] = {
        "bf16": {},
        "mxfp4": {"mxfp4": True},
        "bf16-square": {"square": True},
        "mxfp4-square": {"mxfp4": True, "square": True},
    }
    return {name: _write_tiny(folder / name, **options) for name, options in forms.items()}


@pytest.fixture(scope="session")
def imported(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BF16 checkpoint as our importer writes it; for reading only."""
    from gptoss_convert.convert import import_checkpoint

    folder = tmp_path_factory.mktemp("imported") / "megatron"
    import_checkpoint(originals["bf16"], folder)
    return folder


@pytest.fixture
def hf(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A BF16 checkpoint of three shards to damage."""
    return Path(shutil.copytree(originals["bf16"], tmp_path / "hf"))


@pytest.fixture
def hf_mxfp4(originals: dict[str, Path], tmp_path: Path) -> Path:
    """An MXFP4 checkpoint of three shards to damage."""
    return Path(shutil.copytree(originals["mxfp4"], tmp_path / "hf_mxfp4"))


@pytest.fixture
def megatron(imported: Path, tmp_path: Path) -> Path:
    """An imported checkpoint to damage."""
    return Path(shutil.copytree(imported, tmp_path / "megatron"))


Completed = subprocess.CompletedProcess[str]


class RunCli(Protocol):
    """Run ``gptoss-convert`` with arguments."""

    def __call__(self, *args: object, **options: Any) -> Completed:
        """Options as for subprocess.run."""


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Run the installed command in a process of its own."""
    program = Path(sysconfig.get_path("scripts")) / "gptoss-convert"

    def run(*args: object, env: Mapping[str, str] | None = None, **options: Any) -> Completed:
        command = [str(program), *map(str, args)]
        around = {**os.environ, **(env or {})}
        return subprocess.run(
            command,
            check=False,
            env=around,
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )

    return run


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """Run the command in this process: the same result without the two seconds torch takes."""
    from click.testing import CliRunner

    from gptoss_convert.cli import main

    def run(*args: object, **options: Any) -> Completed:
        argv = list(map(str, args))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gptoss-convert", *argv])
            found = CliRunner().invoke(main, argv, prog_name="gptoss-convert", **options)
        return subprocess.CompletedProcess(argv, found.exit_code, found.stdout, found.stderr)

    return run


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield name, f"link to {os.readlink(path)}"
        else:
            yield name, "folder" if path.is_dir() else _digest(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """Everything below a folder, hidden or not: relative name -> digest of its bytes."""
    return lambda folder: dict(_entries(folder))


@pytest.fixture(scope="session")
def content(tree: Callable[[Path], dict[str, str]]) -> Callable[[Path], dict[str, str]]:
    """The same without the manifest, which also tells where it comes from."""

    def without(folder: Path) -> dict[str, str]:
        found = tree(folder)
        assert found.pop("manifest.json")
        return found

    return without
