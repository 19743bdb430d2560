"""Writing an adapter as Megatron-Bridge does: ``torch_dist``, adapters only, and a section ``peft``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_plugins.megatron.folder import RUN_CONFIG
from gptoss_plugins.megatron.sink import TorchDistSink

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan
    from gptoss_plugins.megatron import metadata


@dataclass(frozen=True)
class Trained:
    """How an adapter was trained, as far as ``run_config.yaml`` tells.

    Attributes:
        rank, alpha: their quotient is the scale.
        linears: Megatron's names of what is adapted.
        is_shared: whether the experts of a layer have one adapter together.
        base: the checkpoint it was trained on.
        dropout: of the adapters' inputs.

    """

    rank: int
    alpha: float
    linears: tuple[str, ...]
    is_shared: bool
    base: str | None
    dropout: float = 0.0

    def sections(self) -> dict[str, dict[str, Any]]:
        """Of ``run_config.yaml``."""
        peft = {
            "_target_": "megatron.bridge.peft.lora.LoRA",
            "dim": self.rank,
            "alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "dropout": self.dropout,
            "share_expert_adapters": self.is_shared,
            "target_modules": list(self.linears),
        }
        checkpoint = {"pretrained_checkpoint": self.base} if self.base else {}
        return {"peft": peft, "checkpoint": checkpoint}


def with_adapter(run_config: bytes, trained: Trained) -> bytes:
    """A ``run_config.yaml`` of ours, that of an adapter."""
    import yaml

    document = yaml.safe_load(run_config)
    for name, fields in trained.sections().items():
        document[name] = {**document.get(name, {}), **fields}
    return yaml.safe_dump(document, sort_keys=True).encode()


class AdapterSink(TorchDistSink):
    """The root folder, with its one iteration.

    Args:
        folder: to write.
        plan: what of.
        trained: how it was trained.

    """

    def __init__(self, folder: Path, plan: ConversionPlan, trained: Trained) -> None:
        self._trained = trained
        super().__init__(folder, plan)

    def _write(self, name: str, data: bytes) -> bytes | None:
        if name == RUN_CONFIG:
            data = with_adapter(data, self._trained)
        return super()._write(name, data)

    def _objects(self) -> Mapping[str, metadata.Stored]:
        """No extra states: an adapter has none."""
        return {}
