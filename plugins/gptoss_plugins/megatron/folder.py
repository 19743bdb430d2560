"""The folders of a Megatron checkpoint: which iteration, and what stands where in it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError
from gptoss_convert.untrusted import read_small, require_inside, require_small
from gptoss_plugins.huggingface.source import COMPANIONS

if TYPE_CHECKING:
    from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.pt"
LATEST_TRAIN_STATE = "latest_train_state.pt"
RUN_STATE = "gptoss_train_state.json"  # what `train` goes on by
METADATA = ".metadata"
MARK = "metadata.json"  # megatron-core takes a folder for a checkpoint if this is there
COMMON = "common.pt"
RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"  # as Megatron-Bridge calls it
HUGGING_FACE = "huggingface"  # config.json and generation_config.json
QUANTIZATION = "quantization"  # parts of a quantized source, one safetensors file per codec

_ITERATION = r"[0-9]{1,18}"
_NUMBERED = re.compile(rf"iter_({_ITERATION})")
_LONGEST_TRACKER = 4096  # bytes
_CARRIED = (*COMPANIONS, "*.model")  # Megatron-Bridge keeps SentencePiece's file too


def folder_of(iteration: int) -> str:
    """The name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def number_of(folder: Path) -> int:
    """The iteration a folder's name tells; 0 for ``release`` and names of one's own."""
    numbered = _NUMBERED.fullmatch(folder.resolve().name)
    return int(numbered[1]) if numbered else 0


def iteration_folder(folder: Path) -> Path | None:
    """The folder with the tensors, of either format: ``folder``, or the iteration its tracker names.

    Without a tracker the highest ``iter_*`` counts. None if there is neither.

    Raises:
        CheckpointError: the tracker names none.

    """
    if _is_distributed(folder) or _has_ranks(folder):
        return folder
    tracker = folder / TRACKER
    if tracker.is_file():
        return folder / _named_by(tracker)
    numbered = sorted(folder.glob("iter_*"))
    found = [p for p in numbered if (p / METADATA).is_file() or _has_ranks(p)]
    return found[-1] if found else None


def _named_by(tracker: Path) -> str:
    """The folder that a tracker file names."""
    text = read_small(tracker, _LONGEST_TRACKER, "write the iteration's number").decode(
        errors="replace"
    )
    text = text.strip()
    if text != "release" and not re.fullmatch(_ITERATION, text):
        raise CheckpointError(
            f"{tracker}: says {text[:40]!r}, which is neither an iteration's number nor release; "
            f"write one of them, or give the iter_* folder you mean"
        )
    return text if text == "release" else folder_of(int(text))


def is_per_rank(folder: Path) -> bool:
    """Whether the folder with the tensors has a file per rank and is no distributed checkpoint."""
    found = iteration_folder(folder)
    return found is not None and _has_ranks(found) and not _is_distributed(found)


def _is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file() or (folder / MARK).is_file()


def _has_ranks(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("mp_rank_*"))


def require_own_files(folder: Path, iteration: Path) -> None:
    """Refuse an iteration with files that are links out of the checkpoint, or too long for what
    they are; data files may have any length.

    Raises:
        CheckpointError: naming the first.

    """
    small = [
        iteration / name for name in (METADATA, MARK, COMMON, RUN_CONFIG, TRAIN_STATE, RUN_STATE)
    ]
    ranks = iteration.glob("mp_rank_*/*.pt")
    carried = companions(iteration).values()
    require_inside(
        folder,
        [iteration, *small, folder / TRACKER, *ranks, *carried, *attachments(iteration).values()],
    )
    require_small(carried)


def companion_place(name: str) -> str:
    """Where a Hugging Face companion file stands inside the iteration folder."""
    kept = HUGGING_FACE if name in ("config.json", "generation_config.json") else TOKENIZER
    return f"{kept}/{name}"


def companions(folder: Path) -> dict[str, Path]:
    """The Hugging Face companions in an iteration folder: name -> file.

    Other files are left where they are: one called ``model.safetensors``, or a module, would be
    taken for the model's by who loads an export.
    """
    return {
        name: path
        for kept in (TOKENIZER, HUGGING_FACE)
        for path in sorted((folder / kept).rglob("*"))
        if path.is_file() and _is_companion(name := path.relative_to(folder / kept).as_posix())
    }


def _is_companion(name: str) -> bool:
    """As a Hugging Face folder's companions are called, those in folders of their own too."""
    return any(
        fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _CARRIED
    )


def attachments(folder: Path) -> dict[str, Path]:
    """Large files beside the weights that go wherever they go: name in the folder -> file."""
    found = sorted((folder / QUANTIZATION).glob("*.safetensors"))
    return {f"{QUANTIZATION}/{p.name}": p for p in found if p.is_file()}
