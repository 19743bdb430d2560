"""A checkpoint for megatron-core to load, in which every pickle that it trusts is ours.

Its loader unpickles ``.metadata`` and ``common.pt`` as they are, so whoever wrote them could run
anything. Tensors it reads with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_plugins.megatron import metadata, sidecars
from gptoss_plugins.megatron.folder import COMMON, MARK, METADATA

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def with_own_pickles(folder: Path) -> Iterator[Path]:
    """A temporary folder with what an iteration's folder says, said by us, and links to its data.

    Raises:
        CheckpointError: its pickles are damaged, or ask for what no checkpoint needs.

    """
    contents = metadata.load(folder)
    common = sidecars.read_common(folder, contents.objects)
    content = common.get("content_metadata") if isinstance(common, dict) else None
    told = {"content_metadata": sidecars.plain(content)} if isinstance(content, dict) else {}
    with tempfile.TemporaryDirectory(prefix="gptoss-convert-load-") as name:
        copy = Path(name)
        (copy / METADATA).write_bytes(metadata.dump(replace(contents, objects={})))
        (copy / COMMON).write_bytes(sidecars.torch_bytes(told))
        (copy / MARK).write_bytes(sidecars.metadata_json())
        for file in metadata.files(contents):
            (copy / file).symlink_to((folder / file).resolve())
        yield copy
