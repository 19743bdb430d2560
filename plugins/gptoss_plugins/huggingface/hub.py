"""Hub ids, through huggingface_hub: its cache, its token, its offline switch."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.errors import NoCheckpointError
from gptoss_plugins.huggingface.headers import INDEX, shard_files
from gptoss_plugins.huggingface.source import COMPANIONS

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

_WEIGHTS = ("*.safetensors", INDEX, "adapter_config.json")
_OTHER_COPIES = ("original/*", "metal/*")  # the same weights once more, in other forms


def fetch(name: str, revision: str | None, headers_only: bool) -> Path:
    """The local folder of a hub repository.

    Args:
        name: ``org/model``.
        revision: branch, tag or commit; None is the default branch.
        headers_only: if the weights are not in the cache, fetch only their headers.

    Raises:
        NoCheckpointError: there is no such repository, no permission, or no network.

    """
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = partial(
        hub.snapshot_download,
        name,
        revision=revision,
        allow_patterns=[*COMPANIONS, *_WEIGHTS],
        ignore_patterns=list(_OTHER_COPIES),
    )
    try:
        if not headers_only:
            return Path(snapshot())
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(snapshot(local_files_only=True))
            if all((cached / file).exists() for file in shard_files(cached)):
                return cached
        return _headers(name, revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NoCheckpointError(
            f"{name}: is no folder here, and the hub did not give it ({reason}); check the name, "
            f"HF_TOKEN, HF_HUB_OFFLINE and the network"
        ) from error


def _headers(name: str, revision: str | None) -> Path:
    """A temporary folder with the repository's small files and with shards that end after their
    headers: enough to plan.
    """
    import huggingface_hub as hub

    small = hub.snapshot_download(
        name,
        revision=revision,
        allow_patterns=[*COMPANIONS, INDEX],
        ignore_patterns=list(_OTHER_COPIES),
    )
    folder = Path(tempfile.mkdtemp(prefix="gptoss-convert-headers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(small, folder, dirs_exist_ok=True)
    for file in shard_files(folder):
        facts = hub.HfApi().parse_safetensors_file_metadata(name, file, revision=revision)
        (folder / file).write_bytes(_header_bytes(facts))
    return folder


def _header_bytes(facts: SafetensorsFileMetadata) -> bytes:
    table = {
        name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": list(t.data_offsets)}
        for name, t in facts.tensors.items()
    }
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text
