"""``gptoss-convert demo``: the main job on a small checkpoint that it makes itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import ConvertError, hookimpl
from gptoss_convert.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from gptoss_convert.registry import Registry

# All sizes differ, so that nothing can be transposed or exchanged unseen.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 1002,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 12,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 3,
    "num_local_experts": 8,
    "pad_token_id": 999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
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
    "vocab_size": 1088,
}
_GENERATION = {"bos_token_id": 998, "do_sample": True, "eos_token_id": [1002, 999]}
MARK = ".gptoss-demo"  # the file that says that a folder is a demo's
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("gptoss-demo"),
    show_default=True,
    help="Folder for the three checkpoints.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 10**9),
    default=0,
    show_default=True,
    help="Of the random weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
@click.pass_context
def demo(ctx: click.Context, output: Path, seed: int, as_json: bool, debug: bool) -> None:
    """Make a small GPT-OSS checkpoint, import it, export it, compare every tensor."""
    from gptoss_convert.program import echo_json, registry_of

    before = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if before and MARK not in before:
        raise ConvertError(f"{output}: is not empty, and no demo's; choose another --output")
    registry, new = registry_of(ctx), not output.exists()
    try:
        facts = _show(output, seed, registry, (lambda _: None) if as_json else click.echo)
    except BaseException:
        _clean_up(output, before - {"openai"}, new=new)
        raise
    if as_json:
        echo_json(facts)


def _show(
    output: Path, seed: int, registry: Registry, say: Callable[[str], None]
) -> dict[str, Any]:
    """All of it; what came of it as plain values (docs/json.md)."""
    from gptoss_convert.convert import export_checkpoint, import_checkpoint

    openai, megatron, exported = (output / n for n in ("openai", "megatron", "huggingface"))
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    tensors = make_checkpoint(openai, seed)
    say(f"1. made      {openai}: {len(tensors)} tensors, experts in MXFP4, seed {seed}")
    done = import_checkpoint(openai, megatron, registry=registry, overwrite=True)
    say(
        f"2. imported  {megatron}: torch_dist in BF16, {done.plan.parameters:,} parameters, "
        f"{done.seconds:.1f} s"
    )
    back = export_checkpoint(megatron, exported, registry=registry, overwrite=True)
    say(f"3. exported  {exported}: safetensors in BF16, {back.seconds:.1f} s")
    count = compare(tensors, exported)
    say(f"4. compared  {count} of {count} tensors are equal, bit for bit")
    say(f"Look at them: gptoss-convert inspect {megatron}")
    return {
        "schema": "gptoss-convert.demo/1",
        "openai": str(openai),
        "megatron": str(megatron),
        "huggingface": str(exported),
        "seed": seed,
        "parameters": done.plan.parameters,
        "tensors": count,
        "seconds": round(done.seconds + back.seconds, 3),
    }


def _clean_up(output: Path, keep: Collection[str], *, new: bool) -> None:
    """Remove what a demo that failed has left, but for what was whole before it."""
    for path in output.iterdir() if output.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if new and output.is_dir():
        output.rmdir()


def make_checkpoint(folder: Path, seed: int) -> dict[str, Tensor]:
    """Write a random checkpoint in the form OpenAI publishes, and return its tensors."""
    import torch

    from gptoss_convert.testing import distinct, hf_specs, write_hf_folder
    from gptoss_plugins.gptoss import gptoss_convert_models

    (family,) = gptoss_convert_models()
    tensors = {}
    for index, (name, spec) in enumerate(hf_specs(family, CONFIG).items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = spec.shape
            noise = torch.Generator().manual_seed(seed * 10_000 + index)
            shape = (experts, rows, inner // 32)
            tensors[name + "_blocks"] = torch.randint(
                256, (*shape, 16), generator=noise, dtype=torch.uint8
            )
            tensors[name + "_scales"] = torch.randint(
                118, 124, shape, generator=noise, dtype=torch.uint8
            )
        else:
            tensors[name] = distinct(spec, seed * 10_000 + index)
    if folder.exists():
        shutil.rmtree(folder)
    files = {"generation_config.json": json.dumps(_GENERATION).encode()}
    write_hf_folder(folder, CONFIG, tensors, shards=3, files=files)
    return tensors


def compare(source: Mapping[str, Tensor], exported: Path) -> int:
    """Compare an exported folder with what it was made of; returns the number of tensors.

    Raises:
        MismatchError: naming the first tensors that differ.
    """
    import torch
    from safetensors.torch import load_file

    found = {n: t for f in exported.glob("*.safetensors") for n, t in load_file(f).items()}
    wanted = {
        name.removesuffix("_blocks"): tensor
        if not name.endswith("_blocks")
        else _by_definition(tensor, source[name.removesuffix("_blocks") + "_scales"])
        for name, tensor in source.items()
        if not name.endswith("_scales")
    }
    differ = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted
        or name not in found
        or not torch.equal(_bits(wanted[name]), _bits(found[name]))
    ]
    if differ:
        raise MismatchError(f"{exported}: {len(differ)} tensors differ, such as {differ[0]}")
    return len(wanted)


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(torch.int16)


def _by_definition(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 as the OCP specification defines it, in float64 and with none of the codec's code.

    uint8 [E, out, in/32, 16] and [E, out, in/32] -> bfloat16 [E, in, out].
    """
    import torch

    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()  # low nibble first
    values = torch.tensor(_E2M1, dtype=torch.float64)[codes & 7]
    signed = torch.where(codes >= 8, -values, values)
    scaled = torch.ldexp(signed, scales.to(torch.float64).unsqueeze(-1) - 127)
    return scaled.flatten(-2).to(torch.bfloat16).transpose(1, 2)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """The demo."""
    yield demo
