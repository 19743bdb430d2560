"""Reading Megatron-Bridge's ``run_config.yaml`` without trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError
from gptoss_convert.untrusted import read_small

if TYPE_CHECKING:
    from pathlib import Path

_DEEPEST = 32
_LONGEST = 256 << 10  # bytes; Megatron-Bridge writes a tenth of that, and YAML is slow to read


def model_of(path: Path) -> dict[Any, Any]:
    """The section ``model``; its values may hold others of them, but nothing is executed.

    Raises:
        CheckpointError: it is no such file.

    """
    return section_of(path, "model")


def section_of(path: Path, name: str) -> dict[Any, Any]:
    """Any section, likewise."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Without what makes a short file endless: merge keys (``<<``), and brackets in brackets."""

        def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
            if self.flow_level > _DEEPEST:
                raise yaml.scanner.ScannerError(
                    problem="it nests too deep", problem_mark=self.get_mark()
                )
            super().fetch_flow_collection_start(token)

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(
                    problem="it has merge keys", problem_mark=node.start_mark
                )

    text = read_small(path, _LONGEST, "restore it")
    try:
        section = yaml.load(text, Loader)[name]  # a SafeLoader
        return dict(section.items())
    except (
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: is no run config ({reason}); restore it") from None
