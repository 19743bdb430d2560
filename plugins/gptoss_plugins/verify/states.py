"""States that checkpoints of GPT-OSS are known to get into, each by the mistake that makes it.

Loaders take all of them without a word, and the model computes something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Finding, PadVocab
from gptoss_convert.types import Pair, Validator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from gptoss_convert.logical import Logical

DOWN, GATE_UP, SINKS = "mlp.experts.down_proj", "mlp.experts.gate_up_proj", "self_attn.sinks"
_MUCH = 0.05  # a rearrangement explains a difference if it leaves less than this share of it
_ORIGINAL = 4096  # positions that GPT-OSS has without YaRN
_CORNER = 512  # of a matrix is enough to see whether it is transposed
_COLUMNS = 64  # of it, to see the order of its rows
_ROWS = 1 << 12  # of padding read at a time

# Fields that decide what a model computes, by what it means that they differ.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "YaRN constants lost": (
        "position_embedding_type",
        "rotary_base",
        "yarn_rotary_scaling_factor",
        "yarn_original_max_position_embeddings",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_mscale",
        "yarn_mscale_all_dim",
        "yarn_correction_range_round_to_int",
    ),
    "sliding window lost": ("window_size", "window_attn_skip_freq"),
    "another model": (
        "num_layers",
        "hidden_size",
        "moe_ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "num_moe_experts",
        "moe_router_topk",
        "layernorm_epsilon",
        "activation_func",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "softmax_type",
        "share_embeddings_and_output_weights",
    ),
}


# --- of the model's config -----------------------------------------------------------------------


def config_kept(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """Both checkpoints, and every copy of the config within each, describe the same model."""
    for one in filter(None, (first, second)):
        own = one.source.megatron_config
        if own is not None and own is not one.config:
            yield from _differences(one.fields, own, f"{one.source.path} (its Megatron config)")
    if second is not None:
        yield from _differences(first.fields, second.fields, str(second.source.path))


def config_of_gpt_oss(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """By itself, too, a config of GPT-OSS has YaRN and layers with a window."""
    for one in filter(None, (first, second)):
        if one.family.name != "gpt-oss":
            continue
        fields, where = one.fields, str(one.source.path)
        if fields["position_embedding_type"] != "yarn" and fields["seq_length"] > _ORIGINAL:
            yield Finding(
                "error",
                where,
                f"YaRN constants lost: the config has none, and {fields['seq_length']} positions",
                "restore the model's own config",
            )
        freq = fields["window_attn_skip_freq"]
        if isinstance(freq, list) and not any(freq):
            yield Finding(
                "error",
                where,
                "sliding window lost: no layer has one, and in GPT-OSS every other layer does",
                "restore the model's own config",
            )


def _differences(
    wanted: Mapping[str, object], found: Mapping[str, object], where: str
) -> Iterator[Finding]:
    for state, names in _FIELDS.items():
        differ = [n for n in names if n in wanted and not _alike(n, wanted[n], found)]
        if differ:
            told = ", ".join(f"{n} is {found.get(n)!r}, not {wanted[n]!r}" for n in differ)
            yield Finding("error", where, f"{state}: {told}", "restore the model's own config")


def _alike(name: str, wanted: object, found: Mapping[str, object]) -> bool:
    if name not in found:  # Megatron-LM's arguments have no place for some
        return wanted is None or not name.startswith(("yarn", "window"))
    value = found[name]
    if isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(wanted) == list(value)
    return wanted == value


# --- of tensors by themselves --------------------------------------------------------------------


def sinks_there(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """Every layer has its attention sinks."""
    for one in filter(None, (first, second)):
        for problem in one.problems:
            name, _, rest = problem.partition(": ")
            if name.endswith((SINKS, "softmax_offset")) and rest.startswith("is missing"):
                yield Finding(
                    "error",
                    f"{one.source.path}: {name}",
                    "missing sinks: attention would give all of its weight to tokens",
                    "convert the model again with a tool that carries them",
                )


def sinks_not_zero(pair: Pair) -> Iterator[Finding]:
    """Attention sinks were loaded, not left as they were made."""
    if not pair.name.endswith(SINKS):
        return
    for tensor in (pair.first, pair.second):
        if tensor is not None and not tensor.any():
            yield Finding(
                "error",
                pair.name,
                "zero sinks: they were left as they were made, and never loaded",
                "convert the model again with a tool that carries them",
            )
            return


def padding_zero(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """Rows that pad a vocabulary hold nothing: they make logits, which compete with real ones."""
    for one in filter(None, (first, second)):
        if one.side != "megatron":
            continue
        specs = one.source.specs()
        for step in one.steps.values():
            if not isinstance(step.rule.op, PadVocab):
                continue
            for found in step.inputs:
                rows, all_rows = found.spec.shape[0], specs[found.name].shape[0]
                wrong = sum(_rows_with_values(one, found.name, rows, all_rows))
                if wrong:
                    yield Finding(
                        "error",
                        f"{one.source.path}: {found.name}",
                        f"vocabulary padding that is not zero: {wrong} of the {all_rows - rows} rows "
                        f"from {rows} on hold values",
                        "write the checkpoint again; reshard leaves the padding out",
                    )


def _rows_with_values(of: Logical, name: str, start: int, stop: int) -> Iterator[int]:
    for row in range(start, stop, _ROWS):
        rows = of.source.read(name, slice(row, min(row + _ROWS, stop)))
        yield int(rows.flatten(1).any(1).sum())


# --- of tensors beside others --------------------------------------------------------------------


def experts_in_order(pair: Pair) -> Iterator[Finding]:
    """What differs between two checkpoints' experts is no known mistake of order."""
    if pair.equal or pair.second is None:
        return
    if pair.name.endswith((DOWN, GATE_UP)):
        both = (_natural(tensor, pair) for tensor in (pair.first, pair.second))
        first, second = (matrix[:_CORNER, :_CORNER] for matrix in both)
        is_square = pair.shape[-1] == pair.shape[-2]
        if is_square and _explains(first, second, second.T):
            short = pair.name.rsplit(".", 1)[-1]
            yield Finding(
                "error",
                pair.name,
                f"transposed {short}: rows and columns of every expert are swapped",
                "convert the model again; a square matrix does not show its orientation",
            )
    if pair.name.endswith((GATE_UP, GATE_UP + "_bias")):
        both = (_gated_rows(tensor, pair) for tensor in (pair.first, pair.second))
        first, second = (rows[..., :_COLUMNS] if rows.dim() > 1 else rows for rows in both)
        for state, rows in _gate_orders(second):
            if _explains(first, second, rows):
                yield Finding(
                    "error",
                    pair.name,
                    state,
                    "convert the model again with a tool that knows GPT-OSS's order of gate and up",
                )
                return


def _natural(tensor: Tensor, pair: Pair) -> Tensor:
    """The first expert as ``[out, in]``, in whatever order of rows."""
    expert: Tensor = tensor[0]
    if pair.in_hf_order:
        return expert.T
    return expert.flatten(0, 1) if expert.dim() == 3 else expert


def _gated_rows(tensor: Tensor, pair: Pair) -> Tensor:
    """The first expert's rows, or biases, in Hugging Face's order: gate, up, gate, up."""
    expert = tensor[0]
    if pair.in_hf_order:
        return expert if pair.name.endswith("_bias") else expert.T
    rows = expert.flatten() if pair.name.endswith("_bias") else _natural(tensor, pair)
    halves: Tensor = rows.unflatten(0, (2, -1))
    return halves.transpose(0, 1).flatten(0, 1)


def _gate_orders(rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What rows would be if a known mistake were undone."""
    halves = rows.unflatten(0, (2, -1))
    pairs = rows.unflatten(0, (-1, 2))
    yield (
        "gate and up not de-interleaved: halves were taken of rows in which they alternate",
        pairs.transpose(0, 1).flatten(0, 1),
    )
    yield (
        "gate and up de-interleaved once too often: all gates stand first where they should alternate",
        halves.transpose(0, 1).flatten(0, 1),
    )
    yield "gate and up swapped: each stands where the other belongs", pairs.flip(1).flatten(0, 1)


def _explains(first: Tensor, second: Tensor, mended: Tensor) -> bool:
    """Whether a tensor that was mended is much nearer to the first than as it is."""
    before = (second.double() - first.double()).square().sum()
    after = (mended.double() - first.double()).square().sum()
    return bool(after <= _MUCH**2 * before)


def validators() -> Iterable[Validator]:
    """All of them."""
    yield Validator("config", "model", config_kept)
    yield Validator("config of GPT-OSS", "model", config_of_gpt_oss)
    yield Validator("sinks", "model", sinks_there)
    yield Validator("vocabulary padding", "model", padding_zero)
    yield Validator("zero sinks", "values", sinks_not_zero)
    yield Validator("experts in order", "values", experts_in_order)
