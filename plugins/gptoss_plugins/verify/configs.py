"""Whether every copy of a model's config describes the model, and the same one.

A Megatron checkpoint may have several: Hugging Face's ``config.json``, Megatron-Bridge's
``run_config.yaml``, Megatron-LM's ``args``, those in the file of every rank. Who loads it believes one of
them, so all are looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gptoss_convert import Finding, PadVocab

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptoss_convert.logical import Logical
    from gptoss_convert.types import TensorSource

YARN, WINDOW, SINKS_OFF = "YaRN constants lost", "sliding window lost", "sinks switched off"
_MSCALES = ("yarn_mscale", "yarn_mscale_all_dim")
_RESTORE = "restore the model's own config"
_ORIGINAL = 4096  # positions that GPT-OSS has without YaRN

# Fields that decide what a model computes, by what it means that they differ.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    YARN: (
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "yarn_rotary_scaling_factor",
        "yarn_original_max_position_embeddings",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_mscale",
        "yarn_mscale_all_dim",
        "yarn_correction_range_round_to_int",
    ),
    WINDOW: ("window_size", "window_attn_skip_freq"),
    SINKS_OFF: ("softmax_type",),
    "another model": (
        "num_layers",
        "hidden_size",
        "moe_ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "num_moe_experts",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "normalization",
        "layernorm_epsilon",
        "add_bias_linear",
        "gated_linear_unit",
        "activation_func",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "share_embeddings_and_output_weights",
    ),
}
# What a loader takes for a field that is missing: the default of megatron-core's TransformerConfig and
# GPTModel, but for tied embeddings, where Megatron-Bridge's and Megatron-LM's own is the other way
# round. Only where this is the model's value may a copy go without the field. None: there is none.
_DEFAULTS: Mapping[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": "gelu",
    "glu_linear_offset": 0.0,
    "share_embeddings_and_output_weights": True,
}
# As both published models have it.
_PUBLISHED: Mapping[str, Any] = {
    "position_embedding_type": "yarn",
    "rotary_base": 150000,
    "yarn_rotary_scaling_factor": 32,
    "yarn_original_max_position_embeddings": _ORIGINAL,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": False,
    "window_size": [127, 0],
    "window_attn_skip_freq": 2,
    "activation_func_clamp_value": 7,
}


def config_kept(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """Both checkpoints, and every copy of the config within each, describe the same model."""
    for one in filter(None, (first, second)):
        told: set[Finding] = set()
        for place, copy in _copies(one.source).items():
            for found in _differences(one.fields, copy, place, _rows(one)):
                alike = Finding(found.severity, "", found.what)
                if alike not in told:  # the ranks' files mostly say the same
                    told.add(alike)
                    yield found
    if second is not None:
        where = str(second.source.path)
        yield from _differences(first.fields, second.fields, where, _rows(second))


def config_of_gpt_oss(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """By itself, too, a config of GPT-OSS has YaRN and layers with a window."""
    for one in filter(None, (first, second)):
        if one.family.name != "gpt-oss":
            continue
        fields, where = one.fields, str(one.source.path)
        if fields["position_embedding_type"] != "yarn" and fields["seq_length"] > _ORIGINAL:
            positions = f"the config has none, and {fields['seq_length']} positions"
            yield Finding("error", where, f"{YARN}: {positions}", _RESTORE)
        elif second is None:
            yield from _unpublished(fields, where)
        if not any(_windows(fields["window_attn_skip_freq"], fields["num_layers"]) or ()):
            none = "no layer has one, and in GPT-OSS every other layer does"
            yield Finding("error", where, f"{WINDOW}: {none}", _RESTORE)


def differing(wanted: Mapping[str, Any], found: Mapping[str, Any], rows: int = 0) -> dict[str, str]:
    """What two models' fields mean that differ -> which, and how.

    Args:
        wanted: all fields of a model.
        found: the same of another, or a copy that may lack some.
        rows: of the stored vocabulary, padding included.

    """
    told: dict[str, str] = {}
    for state, names in _FIELDS.items():
        differ = [n for n in names if n in wanted and not _alike(n, wanted, found, rows)]
        if differ:
            told[state] = ", ".join(f"{_said(n, found)}, not {wanted[n]!r}" for n in differ)
    return told


def _copies(source: TensorSource) -> dict[str, Mapping[str, Any]]:
    """Every copy of the model in Megatron's fields, by where it is; one that says nothing is none."""
    many = getattr(source, "megatron_configs", None)
    if many is None:
        many = {"its Megatron config": source.megatron_config}
    names = {name for group in _FIELDS.values() for name in group}
    return {
        f"{source.path} ({place})": fields
        for place, fields in many.items()
        if fields and not names.isdisjoint(fields)
    }


def _rows(of: Logical) -> int:
    """Of the stored vocabulary, padding included."""
    specs = of.source.specs()
    padded = [step for step in of.steps.values() if isinstance(step.rule.op, PadVocab)]
    return max((specs[i.parts[0][0]].shape[0] for s in padded for i in s.inputs), default=0)


def _differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], where: str, rows: int
) -> Iterator[Finding]:
    for state, told in differing(wanted, found, rows).items():
        yield Finding("error", where, f"{state}: {told}", _RESTORE)
    length = found.get("seq_length")  # a trainer writes its own there, and no logit depends on it
    if length is not None and length != wanted.get("seq_length", length):
        told = f"seq_length is {length!r}, not {wanted['seq_length']!r}"
        yield Finding("warning", where, told, "a loader may take it for the longest context")


def _alike(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any], rows: int) -> bool:
    value, right = _value(name, found), wanted[name]
    if name == "vocab_size":  # may be left to the tokenizer, or told with its padding
        return value is None or value == right or value == rows > right
    if name == "window_attn_skip_freq":
        layers = wanted["num_layers"]
        return _windows(value, layers) == _windows(right, layers)
    if name in _MSCALES:
        return _concentration(wanted, found) == _concentration(wanted, wanted)
    if isinstance(right, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(right) == list(value)
    return bool(right == value)


def _concentration(model: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """What YaRN multiplies sines and cosines by, as megatron-core has it, which is what both mscales
    are for: Megatron-LM's 1.0 and 0.0 are the same as none.
    """
    scale = math.log(max(1.0, model.get("yarn_rotary_scaling_factor") or 1.0))
    over, under = (found.get(name) for name in _MSCALES)
    if over is None or under is None:
        over, under = 1.0, 0.0
    if not all(isinstance(one, (int, float)) for one in (over, under)):
        return None
    return float((0.1 * over * scale + 1) / (0.1 * under * scale + 1))


def _value(name: str, found: Mapping[str, Any]) -> Any:
    """A field, or what a loader takes in its place."""
    if (value := found.get(name)) is not None:
        return value
    if name == "num_query_groups":
        return found.get("num_attention_heads")
    if name == "moe_ffn_hidden_size":
        return found.get("ffn_hidden_size")
    if name == "kv_channels" and found.get("hidden_size") and found.get("num_attention_heads"):
        return found["hidden_size"] // found["num_attention_heads"]
    return _DEFAULTS.get(name)


def _said(name: str, found: Mapping[str, Any]) -> str:
    if name in found:
        return f"{name} is {found[name]!r}"
    default = _value(name, found)
    return f"{name} is missing" + ("" if default is None else f", so {default!r}")


def _windows(freq: Any, layers: int) -> list[bool] | None:
    """By layer, whether its attention has a window, as megatron-core reads ``window_attn_skip_freq``:
    its layers count from 1, and one that the number divides has none; without it all have.

    Returns:
        None if it cannot be read.

    """
    if freq is None:
        return [True] * layers
    if isinstance(freq, (list, tuple)):
        return [bool(one) for one in freq]
    return [n % freq != 0 for n in range(1, layers + 1)] if isinstance(freq, int) and freq else None


def _unpublished(fields: Mapping[str, Any], where: str) -> Iterator[Finding]:
    """Who has no other checkpoint to hold it against is told what is unusual."""
    usual = {**fields, **_PUBLISHED}
    differ = [name for name in _PUBLISHED if not _alike(name, usual, fields, 0)]
    told = [f"{_said(name, fields)}, not {usual[name]!r}" for name in differ]
    if told:
        what = f"not the constants of the published models: {', '.join(told)}"
        yield Finding("warning", where, what, "restore the model's own config unless this is meant")
