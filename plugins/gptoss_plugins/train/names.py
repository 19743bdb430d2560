"""Dotted names of fields (``train.train_iters``): which there are, and what a wrong one meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError
from gptoss_plugins.train.config import TrainingConfig
from gptoss_plugins.train.reading import hints_of, sections_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Names that scripts for other versions of Megatron-Bridge use -> ours. (It has a second
# use_distributed_optimizer, and sets both where one is set.)
ALIASES: Mapping[str, str] = {
    "dataset.seq_length": "dataset.sequence_length",
    "dataset.seed": "dataset.random_seed",
    "dataset.offline_packing_specs.pad_seq_to_mult": "dataset.pad_seq_to_mult",
    "dataset.packed_sequence_specs.pad_seq_to_mult": "dataset.pad_seq_to_mult",
    "ddp.use_distributed_optimizer": "optimizer.use_distributed_optimizer",
    "scheduler.max_lr": "optimizer.lr",
    "validation.eval_interval": "train.eval_interval",
    "validation.eval_iters": "train.eval_iters",
}


def section_types() -> dict[str, tuple[type, ...]]:
    """The sections, and the dataclasses that each may be."""
    return {name: sections_of(hint) for name, hint in hints_of(TrainingConfig).items()}


def require_section(name: str, said: str) -> None:
    """Refuse a name of no section; ``said`` is what was written."""
    sections = section_types()
    if name in sections:
        return
    every = [f"{section}.{field}" for section in sections for field in _fields(section)]
    same = [one for one in every if one.partition(".")[2] == said.rpartition(".")[2]]
    near = difflib.get_close_matches(name, sections, 1)
    guess = (same or near or difflib.get_close_matches(said, every, 1) or [""])[0]
    raise UsageError(
        f"{said}: there is no section {name!r}{_meant(guess)} there are {', '.join(sections)}"
    )


def require_field(section: str, field: str, kind: type) -> None:
    """Refuse a name of no field of a section, which here is of a certain kind."""
    known = hints_of(kind)
    if field in known:
        return
    said = f"{section}.{field}"
    others = [name for name in section_types() if name != section and field in _fields(name)]
    if field in _fields(section):  # of the section's other kind
        raise UsageError(
            f"{said}: only {_other(section, kind)} has it, and this is {_told(kind)}; start from a "
            f"recipe for that"
        )
    near = difflib.get_close_matches(field, known, 1)
    guess = f"{section}.{near[0]}" if near else f"{others[0]}.{field}" if others else ""
    raise UsageError(
        f"{said}: there is no such field{_meant(guess)} {section} has {', '.join(known)}"
    )


def _fields(section: str) -> Iterable[str]:
    return dict.fromkeys(name for kind in section_types()[section] for name in hints_of(kind))


def _meant(guess: str) -> str:
    return f"; did you mean {guess}?" if guess else ";"


def _told(kind: type) -> str:
    return {"PretrainDataset": "pretraining", "SftDataset": "fine-tuning"}.get(
        kind.__name__, kind.__name__
    )


def _other(section: str, kind: type) -> str:
    return " or ".join(_told(one) for one in section_types()[section] if one is not kind)
