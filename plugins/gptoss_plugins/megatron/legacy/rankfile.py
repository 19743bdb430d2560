"""One rank's file: laid out before its first byte is written, and read without executing anything."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import BlockReader
from gptoss_convert.errors import CheckpointError
from gptoss_convert.types import TensorSpec
from gptoss_plugins.megatron import safe_pickle
from gptoss_plugins.megatron.items import Item
from gptoss_plugins.megatron.legacy.names import GROUPED_GEMM, Stored, stored
from gptoss_plugins.megatron.legacy.pickling import Promise, dumps
from gptoss_plugins.megatron.torchzip import DAMAGED, locate, open_archive, preamble, read_pickle
from gptoss_plugins.megatron.torchzip import Item as Located
from gptoss_plugins.megatron.ziprecords import Archive, Record, directory, local_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gptoss_plugins.megatron.safe_pickle import TensorRecord

BEGINNING, END = "", "/"  # outputs without data, by names that no tensor has
_MODEL = re.compile(r"model([0-9]{0,4})")


@dataclass(frozen=True)
class Slot:
    """A tensor of a file to write.

    Attributes:
        chunk, name: the key of its chunk's state in the file, and its name there.
        spec: of the whole tensor.
        padding: how many bytes of zeros it ends in.

    """

    chunk: str
    name: str
    spec: TensorSpec
    padding: int = 0


def lay_out(
    outputs: Mapping[str, Sequence[Slot]],
    state: Mapping[str, Any],
    others: Mapping[str, Sequence[str]],
) -> dict[str, list[Item]]:
    """The items of a rank's file, by output, one behind the other from its first byte on.

    Args:
        outputs: the slots that every output of the file's group fills, in the order of the file.
        state: what the file holds besides the model.
        others: chunk key -> names in it that have no tensor; every chunk is there.

    """
    slots = [slot for found in outputs.values() for slot in found]
    models: dict[str, dict[str, Any]] = {chunk: {} for chunk in others}
    for key, slot in enumerate(slots):
        models[slot.chunk][slot.name] = Promise(str(key), slot.spec)
    for chunk, names in others.items():
        models[chunk] |= dict.fromkeys(names)
    start, records = preamble(dumps({**state, **_ordered(models)}))
    items = {BEGINNING: [Item(0, head=start)]}
    position, keys = len(start), itertools.count()
    for name, found in outputs.items():
        items[name] = []
        for slot in found:
            record = Record(f"data/{next(keys)}", position, slot.spec.nbytes)
            data = record.size - slot.padding
            head, what = local_header(record), f"{slot.chunk}.{slot.name}"
            items[name].append(Item(position, head, data, slot.padding, name=what))
            records.append(record)
            position = items[name][-1].end
    items[END] = [Item(position, tail=directory(records, position))]
    return items


def _ordered(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """As ``Module.state_dict`` returns them."""
    return {chunk: OrderedDict(tensors) for chunk, tensors in models.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the name it has there, what that stands for, and where its bytes are."""

    name: str
    stored: Stored
    record: TensorRecord

    @property
    def spec(self) -> TensorSpec:
        """Its shape and type."""
        return TensorSpec(self.record.shape, self.record.dtype)


@dataclass
class RankFile:
    """A rank's file, its pickle read.

    Attributes:
        path: the file.
        common: what all ranks have in common (``args``).
        keys: what the file holds, by its outermost keys.
        chunks: the tensors of every chunk, by canonical name (their layers counted from the
            chunk's first), and then by expert; None for a tensor that is no single expert's.

    """

    path: Path
    common: Mapping[str, Any]
    keys: frozenset[str]
    chunks: list[dict[str, dict[int | None, StoredTensor]]] = field(default_factory=list)
    reader: BlockReader = field(init=False)
    archive: Archive = field(init=False)

    @property
    def args(self) -> Mapping[str, Any]:
        """Megatron-LM's arguments, by name; empty if there are none."""
        args = self.common.get("args")
        return vars(args) if isinstance(args, safe_pickle.Inert) else {}

    def locate(self, tensor: StoredTensor) -> Located:
        """Where a tensor's bytes are.

        Raises:
            CheckpointError: they are not whole there.

        """
        try:
            return locate(self.archive, tensor.record)
        except DAMAGED as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} is damaged ({error}); copy the file again"
            ) from None


def read(path: Path) -> RankFile:
    """Read a rank's file, its tensors apart.

    Raises:
        CheckpointError: it is missing, damaged, or holds what is not read.

    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no plain file")
        reader = BlockReader(path)
        archive = open_archive(reader, 0, path.stat().st_size)
        pickled = read_pickle(reader, archive)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; copy the whole checkpoint again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from None
    except DAMAGED as error:
        raise CheckpointError(
            f"{path}: is no whole torch.save file ({error}); copy it again"
        ) from None
    state = safe_pickle.load(pickled, str(path))
    models = _models(state, path)
    common = {"args": state.get("args")}
    found = RankFile(path, common, frozenset(key for key in state if isinstance(key, str)))
    found.reader, found.archive = reader, archive
    try:
        found.chunks = [_tensors(model, path) for model in models]
    except ValueError as error:
        raise CheckpointError(
            f"{path}: has a name that is none of a model's ({error}); copy the file again"
        ) from None
    return found


def _models(state: Any, path: Path) -> list[Mapping[str, Any]]:
    """The state of every chunk, in their order."""
    named = state if isinstance(state, dict) else {}
    found = {key: _MODEL.fullmatch(key) for key in named if isinstance(key, str)}
    numbers = {int(hit[1] or 0): key for key, hit in found.items() if hit}
    models = [named[numbers[number]] for number in sorted(numbers)]
    if not models or sorted(numbers) != list(range(len(numbers))):
        raise CheckpointError(
            f"{path}: holds no state of a model under model or model0, model1, ...; give a "
            f"checkpoint that Megatron-LM wrote with --ckpt-format torch"
        )
    version = named.get("checkpoint_version", 3.0)
    if isinstance(version, (int, float)) and version < 2:
        raise CheckpointError(
            f"{path}: is of checkpoint_version {version}, which orders queries, keys and values in "
            f"another way; load it in Megatron-LM and save it again"
        )
    if not all(isinstance(model, dict) for model in models):
        raise CheckpointError(f"{path}: its model is no state dict; write the checkpoint again")
    return models


def _tensors(model: Mapping[str, Any], path: Path) -> dict[str, dict[int | None, StoredTensor]]:
    tensors: dict[str, dict[int | None, StoredTensor]] = {}
    for name, value in model.items():
        if not isinstance(name, str):
            raise ValueError("one that is no text")
        if value is None or (meaning := stored(name)) is None:
            continue
        if isinstance(value, dict):
            raise CheckpointError(
                f"{path}: {name} holds modules of its own, as before Megatron-Core; load it in the "
                f"Megatron-LM it is from and save it with --use-mcore-models"
            )
        if name.endswith(GROUPED_GEMM):
            raise CheckpointError(
                f"{path}: {name} is of the legacy GroupedMLP, which GPT-OSS (its experts have "
                f"biases) never has; save it with --moe-grouped-gemm of Transformer Engine, or "
                f"without"
            )
        if not isinstance(value, safe_pickle.TensorRecord):
            raise CheckpointError(
                f"{path}: {name} is {type(value).__name__} and no plain tensor; save the model "
                f"without FP8 parameters"
            )
        experts = tensors.setdefault(meaning.name, {})
        if meaning.expert in experts:
            raise CheckpointError(
                f"{path}: {name} and {experts[meaning.expert].name} are the same tensor; remove "
                f"the stale one"
            )
        experts[meaning.expert] = StoredTensor(name, meaning, value)
    return tensors
