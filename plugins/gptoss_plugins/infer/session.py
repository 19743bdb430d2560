"""A checkpoint opened to be talked to: its tokenizer, and its model on the ranks there are."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_convert.device import require_device
from gptoss_convert.errors import PlanError, UsageError
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import open_source, own_config
from gptoss_convert.progress import reporting
from gptoss_plugins.gpt_model.installed import require_installed
from gptoss_plugins.infer.tokenizer import VOCABULARY, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from gptoss_convert.layout import Layout
    from gptoss_convert.logical import Logical
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_plugins.infer.engine import Engine
    from gptoss_plugins.infer.tokenizer import Tokenizer


log = logging.getLogger("gptoss_convert")


@dataclass(frozen=True)
class Wanted:
    """What a command line names.

    Attributes:
        hf_model: Hugging Face folder or hub id; the weights, unless there is a Megatron checkpoint.
        hf_revision: of the hub id.
        megatron_path: root or ``iter_*`` folder.
        tokenizer: folder with a tokenizer; the checkpoint's own if None.
        adapter: folder or hub id of an adapter, added to the weights as they are loaded.

    """

    hf_model: str | None
    hf_revision: str | None
    megatron_path: Path | None
    tokenizer: Path | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Session:
    """A model ready to answer.

    Attributes:
        engine: this rank's.
        tokenizer: the checkpoint's.
        rank: this process's number; 0 talks to the user.
        vocabulary: how many token ids the model knows.
        place: this rank's device.

    """

    engine: Engine
    tokenizer: Tokenizer
    rank: int
    vocabulary: int
    place: torch.device

    def require_known(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise UsageError unless the model has a row for every token."""
        most = max((max(prompt, default=0) for prompt in prompts), default=0)
        if most >= self.vocabulary:
            raise UsageError(
                f"{self.tokenizer.where}: its tokenizer made token {most}, and the model knows "
                f"{self.vocabulary}; it is another model's tokenizer"
            )

    def shared(self, text: str | None) -> str | None:
        """The first rank's text, on all of them; all ranks call this together."""
        import torch
        import torch.distributed as dist

        if dist.get_world_size() == 1:
            return text
        data = b"" if text is None else text.encode("utf-8", "surrogateescape")
        size = torch.tensor([len(data) if text is not None else -1], device=self.place)
        dist.broadcast(size, 0)
        if size.item() < 0:
            return None
        room = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.place)
        if self.rank == 0:
            room.copy_(torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)])
        dist.broadcast(room, 0)
        return bytes(room.cpu().numpy()).decode("utf-8", "surrogateescape")

    def peak_bytes(self) -> int:
        """The most memory this rank has used: of its GPU, or of the process."""
        from gptoss_plugins.gpt_model.memory import peak_bytes

        return peak_bytes(self.place)


@contextlib.contextmanager
def open_session(
    wanted: Wanted,
    registry: Registry,
    choice: Choice,
    layout: Layout,
    *,
    device: str | None,
    dtype: str | None,
    show: bool,
) -> Iterator[Session]:
    """Open, check, load. All ranks do this together.

    Args:
        wanted: which checkpoint.
        registry: the plugins.
        choice: decides where several would do.
        layout: of the ranks.
        device: ``cpu`` or ``cuda``; CUDA where there is one, if None.
        dtype: of the model; bfloat16 on a GPU and float32 elsewhere, if None.
        show: progress on stderr.

    Raises:
        ConvertError: whatever is wrong, before any weight is read where that can be.

    """
    require_installed(
        "running the model", "megatron", "transformers", extras="megatron,transformers"
    )
    require_device(device)
    checkpoint, files = _checkpoint(wanted, registry, choice)
    tokenizer = load_tokenizer(files, str(wanted.tokenizer or checkpoint.source.path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
        from gptoss_plugins.gpt_model.filling import fill
        from gptoss_plugins.gpt_model.live import build_live
        from gptoss_plugins.gpt_model.world import world_of
        from gptoss_plugins.infer.decoder import Decoder
        from gptoss_plugins.infer.engine import Engine
    from gptoss_plugins.verify.logits import precision

    rank = int(os.environ.get("RANK", "0"))
    with world_of(layout, device, schedules=False) as place:
        live = build_live(checkpoint.fields, layout, registry, place, precision(dtype, device))
        total = sum(p.nbytes for model in live.models for p in model.parameters())
        with reporting("load", total, show=show and rank == 0) as progress:
            fill(live, checkpoint, progress)
        vocabulary = checkpoint.fields["vocab_size"]
        if len(tokenizer) > vocabulary and rank == 0:
            log.warning(
                "%s: its tokenizer has %d tokens and the model knows %d; is it another model's?",
                tokenizer.where,
                len(tokenizer),
                vocabulary,
            )
        decoder = Decoder(live.models[0], vocabulary)
        engine = Engine(decoder, checkpoint.fields["seq_length"], tokenizer.stop_ids)
        yield Session(engine, tokenizer, rank, vocabulary, place)


def _checkpoint(
    wanted: Wanted, registry: Registry, choice: Choice
) -> tuple[Logical, Mapping[str, Path]]:
    """The checkpoint with the weights, and the files that have its tokenizer."""
    from gptoss_convert.convert import describe_model

    revision = wanted.hf_revision
    if wanted.megatron_path is None:
        if wanted.hf_model is None:
            raise UsageError("name a checkpoint, with --hf-model or --megatron-path")
        found = open_logical(wanted.hf_model, registry, choice, revision=revision)
        files = found.source.files
    else:
        other: dict[str, Any] = {"registry": registry, "choice": choice, "revision": revision}
        model = wanted.hf_model and open_source(wanted.hf_model, "hf", headers_only=True, **other)
        config = own_config(model) if model else None
        found = open_logical(wanted.megatron_path, registry, choice, config=config)
        _, files, _ = describe_model(found.source, wanted.hf_model, registry, choice, revision)
        if model and VOCABULARY not in files:
            files = model.files
    if found.problems:
        raise PlanError(str(found.source.path), found.problems)
    if wanted.adapter is not None:
        from gptoss_plugins.adapter.merging import with_adapter

        found = with_adapter(found, wanted.adapter, registry, is_exact=True)
    return found, files if wanted.tokenizer is None else _in_folder(wanted.tokenizer)


def tokenizer_files(
    wanted: Wanted, registry: Registry, choice: Choice
) -> tuple[Mapping[str, Path], str]:
    """A tokenizer's files, and where they are, for messages; no weights are needed.

    Raises:
        ConvertError: nothing is named, or it is not there.

    """
    if wanted.tokenizer is not None:
        return _in_folder(wanted.tokenizer), str(wanted.tokenizer)
    named = wanted.megatron_path or wanted.hf_model
    if named is None:
        raise UsageError("name a tokenizer, with --tokenizer, --hf-model or --megatron-path")
    source = open_source(
        named, registry=registry, choice=choice, revision=wanted.hf_revision, headers_only=True
    )
    return source.files, str(source.path)


def _in_folder(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: is no folder; name one")
    return {path.name: path for path in folder.iterdir() if path.is_file()}
