"""Llama for gptoss-convert: a model family, an int8 codec, and a command."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import (
    QKV,
    Codec,
    Concat,
    Drop,
    ModelFamily,
    PadVocab,
    Rule,
    Shard,
    TensorSpec,
    hookimpl,
)
from gptoss_convert.errors import ConfigError, EncodeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.types import Config


@hookimpl
def gptoss_convert_models() -> Iterator[ModelFamily]:
    """Llama, as long as its rotary embedding is not scaled."""
    yield ModelFamily(
        name="llama",
        architectures=frozenset({"LlamaForCausalLM"}),
        rules=rules,
        megatron_config=megatron_config,
        hf_config=hf_config,
        fields=dict.fromkeys(REQUIRED, int),
        unquantized=("model.embed_tokens", "lm_head"),
    )


def rules(config: Config) -> Iterator[Rule]:
    """The mapping table. H hidden size, I intermediate size, D head size, V vocabulary."""
    c = settled(config)
    V, H, I, D = (c[n] for n in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"))
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    q, kv = heads * D, groups * D
    vocab, column, row = PadVocab(V), Shard.COLUMN, Shard.ROW
    hf, mg = "model.layers.{L}.", "decoder.layers.{L}."
    att, mlp, to_att, to_mlp = hf + "self_attn.", hf + "mlp.", mg + "self_attention.", mg + "mlp."
    norm_1, norm_2 = hf + "input_layernorm.weight", hf + "post_attention_layernorm.weight"
    qkv = {
        att + "q_proj.weight": (q, H),
        att + "k_proj.weight": (kv, H),
        att + "v_proj.weight": (kv, H),
    }
    o_proj, down = {att + "o_proj.weight": (H, q)}, {mlp + "down_proj.weight": (H, I)}
    gate_up = {mlp + "gate_proj.weight": (I, H), mlp + "up_proj.weight": (I, H)}

    yield Rule(
        {"model.embed_tokens.weight": (V, H)}, "embedding.word_embeddings.weight", vocab, column
    )
    yield Rule({norm_1: (H,)}, to_att + "linear_qkv.layer_norm_weight")
    yield Rule(qkv, to_att + "linear_qkv.weight", QKV(heads, groups, D), column, quantizable=True)
    yield Rule(o_proj, to_att + "linear_proj.weight", shard=row, quantizable=True)
    yield Rule({norm_2: (H,)}, to_mlp + "linear_fc1.layer_norm_weight")
    yield Rule(gate_up, to_mlp + "linear_fc1.weight", Concat(2), Shard.GATED, quantizable=True)
    yield Rule(down, to_mlp + "linear_fc2.weight", shard=row, quantizable=True)
    yield Rule({"model.norm.weight": (H,)}, "decoder.final_layernorm.weight")
    if c["tie_word_embeddings"]:
        yield Rule({"lm_head.weight": (V, H)}, "", Drop("the embedding serves in its place"))
    else:
        yield Rule({"lm_head.weight": (V, H)}, "output_layer.weight", vocab, column)


NAMES = {  # Megatron's: Hugging Face's
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "activation_func": "hidden_act",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
LLAMA = {  # what every Llama has in common
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def megatron_config(config: Config) -> dict[str, Any]:
    """Hugging Face's fields in Megatron's names."""
    c = settled(config)
    return {mg: c[hf] for mg, hf in NAMES.items()} | LLAMA


def hf_config(megatron: Config) -> dict[str, Any]:
    """The inverse of :func:`megatron_config`."""
    c = {hf: megatron[mg] for mg, hf in NAMES.items()}
    c["rope_parameters"] = {"rope_type": "default", "rope_theta": c["rope_theta"]}
    return c | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def settled(config: Config) -> dict[str, Any]:
    """The config with the fields filled in that a file may leave out."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"config.json: rope type {kind!r} is not mapped; only 'default' is")
    heads = config["num_attention_heads"]
    absent = {
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }
    return absent | {name: value for name, value in config.items() if value is not None}


CODEC = "int8-rowwise"


@hookimpl
def gptoss_convert_codecs() -> Iterator[Codec]:
    """Matrices as int8 [out, in] and one float32 scale per row [out, 1]."""
    suffixes = ("_int8", "_scale")
    yield Codec(CODEC, suffixes, matches, spec, decode, encode, parts=parts, declare=declare)


def matches(config: Config) -> bool:
    """``quantization_config.quant_method`` is ``int8-rowwise``."""
    return (config.get("quantization_config") or {}).get("quant_method") == CODEC


def declare(unquantized: Sequence[str]) -> Mapping[str, Any]:
    """What :func:`matches` looks for."""
    return {"quant_method": CODEC, "modules_to_not_convert": list(unquantized)}


def spec(parts: Sequence[TensorSpec]) -> TensorSpec:
    """I8 [out, in] and F32 [out, 1] -> BF16 [out, in]."""
    rows, scale = parts
    if (rows.dtype, scale.dtype) != ("I8", "F32") or scale.shape != (*rows.shape[:-1], 1):
        raise ValueError(f"{rows} and {scale} are not I8 [out, in] and F32 [out, 1]")
    return TensorSpec(rows.shape, "BF16")


def parts(logical: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The inverse of :func:`spec`."""
    if len(logical.shape) != 2:
        raise ValueError(f"{CODEC} is for matrices, not {list(logical.shape)}")
    return TensorSpec(logical.shape, "I8"), TensorSpec((logical.shape[0], 1), "F32")


def decode(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """int8 times scale in float32, rounded to bfloat16; exact where scales are powers of two."""
    import torch

    rows, scale = parts
    if out is None:
        out = torch.empty(rows.numel(), dtype=torch.bfloat16)
    return torch.mul(rows, scale, out=out.view(rows.shape))


def encode(tensor: Tensor, hints: Any = None, out: Any = None) -> tuple[Tensor, Tensor]:
    """The nearest int8 values. Scales are powers of two, so decoding loses nothing more."""
    import torch

    rows = tensor.float().flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    if not largest.isfinite().all():
        row = int(largest.isfinite().logical_not().nonzero()[0, 0])
        raise EncodeError(row, "holds NaN or infinity, which int8 cannot; mend the checkpoint")
    scale = 2.0 ** (largest.frexp().exponent - 7)  # the largest value of a row becomes 64 to 127
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One command, ``gptoss-convert layers``."""
    yield layers


@click.command()
@click.option("--hf-model", metavar="DIR|ID", required=True, help="Hugging Face folder or hub id.")
def layers(hf_model: str) -> None:
    """Print how many parameters each layer of a model has."""
    from gptoss_convert.convert import prepare_import

    parameters: Counter[int | None] = Counter()
    for step in prepare_import(hf_model, headers_only=True).plan.steps:
        parameters[step.layer] += sum(tensor.spec.numel for tensor in step.inputs)
    for layer, count in parameters.items():
        click.echo(f"{'outside' if layer is None else f'layer {layer}':10} {count:,}")
