"""PEFT's format of adapters: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import WRITER_BYTES, write_file
from gptoss_convert.errors import CheckpointError
from gptoss_convert.plan import Group
from gptoss_convert.untrusted import require_inside
from gptoss_plugins.adapter.peft_config import CONFIG, PICKLED, TENSORS, read_peft_config
from gptoss_plugins.huggingface.headers import read_header
from gptoss_plugins.huggingface.sink import open_shard, shard_header
from gptoss_plugins.huggingface.source import SafetensorsSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.types import GroupWriter


class PeftSource(SafetensorsSource):
    """An adapter's tensors, by PEFT's names."""

    remedy = "save the adapter again"

    def __init__(self, folder: Path) -> None:
        path = folder / TENSORS
        require_inside(folder, (folder / CONFIG, path))
        self.declared = read_peft_config(folder)
        if not path.is_file():
            pickled = (folder / PICKLED).is_file()
            why = f"{PICKLED} is a pickle, which is not read; " if pickled else ""
            raise CheckpointError(
                f"{folder}: has no {TENSORS}; {why}save the adapter with safetensors"
            )
        super().__init__(folder, [read_header(path, self.remedy)])

    @property
    def without_config(self) -> str:
        """What it is, for who asks it for a model's config."""
        return (
            f"{self.path}: is an adapter and no model; name the model, and it with --adapter, or see "
            f"gptoss-convert adapter --help"
        )

    def describe(self) -> Mapping[str, Any]:
        """The file, and what the config says."""
        declared = self.declared
        return {
            **super().describe(),
            "rank": declared.rank,
            "alpha": declared.alpha,
            "targets": [*(declared.modules or ()), *declared.parameters],
            "base": declared.base,
        }

    def fingerprint(self) -> str:
        """The config counts, too."""
        return super().fingerprint() + (self.path / CONFIG).read_text()


class PeftSink:
    """The folder: its tensors in one file, then the config, by which it is an adapter.

    Args:
        folder: to write.
        plan: what of.
        config: the config.

    """

    buffer_bytes = WRITER_BYTES

    def __init__(self, folder: Path, plan: ConversionPlan, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = (json.dumps(config, indent=2) + "\n").encode()
        self._group = Group(TENSORS, plan.steps)
        self._header = shard_header(self._group)

    @property
    def groups(self) -> Sequence[Group]:
        """One."""
        return [self._group]

    @property
    def nbytes(self) -> int:
        """To the byte."""
        return self._group.nbytes + len(self._header) + len(self._config)

    def done(self, group: Group) -> bool:
        """The file gets its name last."""
        return bool((self._folder / group.name).exists())

    def open(self, group: Group) -> GroupWriter:
        """Start the file with its header."""
        return open_shard(self._folder / group.name, group, self._header)

    def finish(self) -> None:
        """The config."""
        write_file(self._folder / CONFIG, self._config)
