"""States that checkpoints of GPT-OSS are known to get into, each by the mistake that makes it.

Loaders take all of them without a word, and the model computes something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Finding, PadVocab
from gptoss_convert.logical import in_common, pieces, read, shapes_of
from gptoss_convert.scratch import Scratch
from gptoss_convert.types import Pair, Validator
from gptoss_plugins.verify.configs import config_kept, config_of_gpt_oss
from gptoss_plugins.verify.orders import experts_in_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gptoss_convert.logical import Logical

SINKS = "self_attn.sinks"
_ROWS = 1 << 12  # of padding read at a time

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
    both = (pair.first,) if pair.second is None else (pair.first, pair.second)
    zero = [name for name, tensor in zip("AB", both, strict=False) if not tensor.any()]
    if zero:
        whose = "" if pair.second is None else f" in {' and '.join(zero)}"
        yield Finding(
            "error",
            pair.name,
            f"zero sinks{whose}: they were left as they were made, and never loaded",
            "convert the model again with a tool that carries them",
        )


def zero_sinks(of: Logical) -> Iterator[Finding]:
    """The same of a checkpoint of which nothing else is read."""
    for key, step in of.steps.items():
        if not key[0].endswith(SINKS):
            continue
        ((piece, _),) = pieces(step, None, 1 << 62)
        part = read(of, piece, Scratch(), in_order=True)
        for name, sinks, _ in in_common(key, part, None):
            shape = shapes_of(key, step)[name]
            yield from sinks_not_zero(Pair(name, step.layer, shape, sinks, None, True, True))


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


def same_shapes(first: Logical, second: Logical | None) -> Iterator[Finding]:
    """Both have their tensors in the same shapes; others cannot be compared."""
    for key, step in first.steps.items():
        if second is None or key not in second.steps:
            continue
        wanted, found = shapes_of(key, step), shapes_of(key, second.steps[key])
        for name in key:
            if found[name] != wanted[name]:
                yield Finding(
                    "error",
                    name,
                    f"has shape {list(found[name])} where A has {list(wanted[name])}",
                    "name two checkpoints of one model",
                )


def validators() -> Iterable[Validator]:
    """All of them."""
    yield Validator("config", "model", config_kept)
    yield Validator("config of GPT-OSS", "model", config_of_gpt_oss)
    yield Validator("shapes", "model", same_shapes)
    yield Validator("sinks", "model", sinks_there)
    yield Validator("vocabulary padding", "model", padding_zero)
    yield Validator("zero sinks", "values", sinks_not_zero)
    yield Validator("experts in order", "values", experts_in_order)
