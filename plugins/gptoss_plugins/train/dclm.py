"""DCLM, preprocessed: what pretraining reads where its data is not named and the environment says where.

``DCLM_DATA_DIR`` is a folder with ``*_text_document.bin`` and ``.idx``, as ``data preprocess`` makes them
of DCLM's shards; ``DCLM_CACHE`` is one for the indices over them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_plugins.train.config import TrainingConfig

_END = "_text_document.idx"


def with_dclm(config: TrainingConfig, environment: Mapping[str, str]) -> TrainingConfig:
    """The config, with the folders that the environment names where it names none itself.

    Raises:
        CheckpointError: the folder has no data.

    """
    folder = environment.get("DCLM_DATA_DIR")
    if not folder or config.dataset.kind != "pretrain" or config.dataset.blend is not None:
        return config
    found = sorted(str(path.with_suffix("")) for path in Path(folder).glob(f"*{_END}"))
    if not found:
        raise CheckpointError(
            f"DCLM_DATA_DIR={folder}: has no *{_END} in it; make them with data preprocess, name "
            f"other data with dataset.blend, or unset it"
        )
    cache = config.dataset.path_to_cache or environment.get("DCLM_CACHE") or None
    return config.having(dataset={"blend": (tuple(found), None), "path_to_cache": cache})
