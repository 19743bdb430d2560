"""The folders of a Megatron checkpoint: which iteration, and what stands where in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.pt"
LATEST_TRAIN_STATE = "latest_train_state.pt"
METADATA = ".metadata"
MARK = "metadata.json"  # megatron-core takes a folder for a checkpoint if this is there
COMMON = "common.pt"
RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"  # as Megatron-Bridge calls it
HUGGING_FACE = "huggingface"  # config.json and generation_config.json
QUANTIZATION = "quantization"  # parts of a quantized source, one safetensors file per codec

_NUMBERED = re.compile(r"iter_(\d+)")


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
    """
    if _is_distributed(folder) or _has_ranks(folder):
        return folder
    tracker = folder / TRACKER
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        return folder / (folder_of(int(text)) if text.isdecimal() else "release")
    numbered = sorted(folder.glob("iter_*"))
    found = [p for p in numbered if (p / METADATA).is_file() or _has_ranks(p)]
    return found[-1] if found else None


def is_per_rank(folder: Path) -> bool:
    """Whether the folder with the tensors has a file per rank and is no distributed checkpoint."""
    found = iteration_folder(folder)
    return found is not None and _has_ranks(found) and not _is_distributed(found)


def _is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file() or (folder / MARK).is_file()


def _has_ranks(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("mp_rank_*"))


def companion_place(name: str) -> str:
    """Where a Hugging Face companion file stands inside the iteration folder."""
    kept = HUGGING_FACE if name in ("config.json", "generation_config.json") else TOKENIZER
    return f"{kept}/{name}"


def companions(folder: Path) -> dict[str, Path]:
    """The Hugging Face companions in an iteration folder: name -> file."""
    return {
        path.relative_to(folder / kept).as_posix(): path
        for kept in (TOKENIZER, HUGGING_FACE)
        for path in sorted((folder / kept).rglob("*"))
        if path.is_file()
    }


def attachments(folder: Path) -> dict[str, Path]:
    """Large files beside the weights that go wherever they go: name in the folder -> file."""
    return {
        f"{QUANTIZATION}/{p.name}": p for p in sorted((folder / QUANTIZATION).glob("*.safetensors"))
    }
