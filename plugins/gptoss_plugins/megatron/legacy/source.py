"""Reading a file per rank: parameters put together from the pieces that the files hold."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError, PlanError
from gptoss_convert.scratch import Scratch
from gptoss_convert.types import Config, TensorSource, TensorSpec, TrainingState
from gptoss_plugins.huggingface.headers import read_json
from gptoss_plugins.huggingface.source import identity
from gptoss_plugins.megatron import sidecars
from gptoss_plugins.megatron.beside import kept
from gptoss_plugins.megatron.folder import (
    QUANTIZATION,
    TRACKER,
    attachments,
    companions,
    iteration_folder,
    number_of,
    require_own_files,
)
from gptoss_plugins.megatron.legacy.grid import read_grid
from gptoss_plugins.megatron.legacy.names import FILE, OPTIMIZER_FILES, dialect_of
from gptoss_plugins.megatron.legacy.pieces import Finder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.layout import Parameter
    from gptoss_plugins.megatron.legacy.joining import Joined


class LegacySource:
    """A checkpoint of one ``torch.save`` file per rank; root or iteration folder."""

    def __init__(self, folder: Path) -> None:
        iteration = iteration_folder(folder)
        if iteration is None:
            raise CheckpointError(f"{folder}: holds no mp_rank_*/{FILE}; check the path")
        if not iteration.is_dir():
            raise CheckpointError(
                f"{folder}: {TRACKER} names {iteration.name}, which is not there; copy it again, "
                f"or give the iter_* folder you mean"
            )
        self.path = folder
        self.iteration = iteration
        require_own_files(folder, iteration)
        self.grid = read_grid(iteration)
        self._joined: Mapping[str, Joined] | None = None

    @property
    def files(self) -> Mapping[str, Path]:
        """Hugging Face companions that the import carried along."""
        return companions(self.iteration)

    @property
    def number(self) -> int:
        """From the folder's name."""
        return number_of(self.iteration)

    @property
    def attachments(self) -> Mapping[str, Path]:
        """What the import kept of a quantized source."""
        return attachments(self.iteration)

    @property
    def state(self) -> TrainingState | None:
        """An optimizer's state, which cannot be carried: it is cut by rank."""
        return TrainingState("", "", self.iteration) if self.has_training_state else None

    @property
    def has_training_state(self) -> bool:
        """Whether the optimizer's state is in the files, or in files of its own beside them."""
        inside = any("optimizer" in file.keys for file in self.grid.files.values())
        return inside or any(
            True for name in OPTIMIZER_FILES for _ in self.iteration.glob(f"mp_rank_*/{name}")
        )

    def hints(self, codec: str) -> TensorSource | None:
        """Parts of the quantized checkpoint this was imported from, if the import kept them."""
        return kept(self.iteration, codec)

    @property
    def config(self) -> Config | None:
        """Hugging Face's config, if the import carried it along."""
        path = self.files.get("config.json")
        return read_json(path) if path else None

    @property
    def megatron_config(self) -> Config | None:
        """From Megatron-LM's ``args``."""
        return sidecars.fields_of(next(iter(self.grid.files.values())).common)

    @property
    def megatron_configs(self) -> Mapping[str, Config]:
        """The same from every rank's file, by its name."""
        files = self.grid.files.values()
        found = {f"args in {f.path.parent.name}/{f.path.name}": f.common for f in files}
        read = {place: sidecars.fields_of(common) for place, common in found.items()}
        return {place: fields for place, fields in read.items() if fields is not None}

    @cached_property
    def _dialect(self) -> str:
        return dialect_of(
            tensor.name
            for file in self.grid.files.values()
            for chunk in file.chunks
            for experts in chunk.values()
            for tensor in experts.values()
        )

    def describe(self) -> Mapping[str, Any]:
        """Iteration, layout, names, training state."""
        files = self.grid.files.values()
        return {
            "iteration": self.iteration.name,
            "parallel": str(self.grid.layout),
            "layers_by_stage": list(self.grid.layout.stages),
            "dialect": self._dialect,
            "files": len(self.grid.files),
            "tensors_stored": sum(len(e) for f in files for c in f.chunks for e in c.values()),
            "optimizer_state": self.has_training_state,
            "companions": sorted(self.files),
            "kept_for_requantizing": sorted(
                path.stem for path in (self.iteration / QUANTIZATION).glob("*.safetensors")
            ),
        }

    def arrange(self, parameters: Mapping[str, Parameter]) -> None:
        """Find the pieces of every parameter.

        Raises:
            PlanError: a rank lacks its piece, or has another than the layout gives it; all are
                listed.

        """
        finder = Finder(self.grid, parameters)
        self._joined = finder.found()
        if finder.problems:
            raise PlanError(str(self.iteration), finder.problems)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Whole parameters by name; before ``arrange`` every stored tensor under its file's name."""
        if self._joined is not None:
            return {name: joined.spec for name, joined in self._joined.items()}
        return {
            f"{file.path.parent.name}/{number}/{tensor.name}": tensor.spec
            for file in self.grid.files.values()
            for number, chunk in enumerate(file.chunks)
            for experts in chunk.values()
            for tensor in experts.values()
        }

    def check(self) -> None:
        """Every tensor's bytes are in its file."""
        problems = []
        for file in self.grid.files.values():
            try:
                for chunk in file.chunks:
                    for experts in chunk.values():
                        for tensor in experts.values():
                            file.locate(tensor)
            except CheckpointError as error:
                problems.append(str(error).removeprefix(f"{self.iteration}/"))
        if problems:
            raise PlanError(str(self.iteration), problems)

    def fingerprint(self) -> str:
        """From sizes and times of change; reads no data."""
        digest = hashlib.sha256()
        for file in self.grid.files.values():
            stat = identity(os.stat(file.path))
            digest.update(f"{file.path.relative_to(self.iteration)}:{stat}:".encode())
        for name, path in self.files.items():
            digest.update(os.fsencode(name) + path.read_bytes())
        return digest.hexdigest()

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The parameter, or ``rows`` of its dim 0, put together from the ranks' pieces.

        Every rank that has a piece is read, and all that have the same one must agree. Files
        differ where training went wrong (experts with biases under tensor parallelism did in
        Megatron-Core, silently), and each byte is read once, so that costs little.
        """
        assert self._joined is not None, "arrange() comes first"
        return self._joined[name].read(rows, scratch or Scratch())
