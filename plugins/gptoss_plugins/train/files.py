"""A config as YAML, written and read back exactly. A file is read as a stranger's would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_convert.untrusted import no_duplicates, read_small
from gptoss_plugins.train.plain import from_plain, to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_plugins.train.config import TrainingConfig

_LONGEST = 64 << 10  # bytes; a config takes 4 KB
_DEEPEST = 8  # brackets in brackets; a blend takes two


class _Loader(yaml.SafeLoader):
    """Without what makes a short file long (aliases, brackets in brackets) or says two things."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="it has aliases (*name)")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level > _DEEPEST:
            raise yaml.scanner.ScannerError(problem="it nests too deep")
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        no_duplicates([(str(key.value), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def to_yaml(config: TrainingConfig) -> str:
    """The whole config, sections and fields in their order."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, width=100))


def from_yaml(path: Path) -> TrainingConfig:
    """The config in a file; what it leaves out has its default.

    Raises:
        UsageError: it is missing or no YAML, names what there is not, or a value is of the wrong
            type.

    """
    try:
        return from_plain(_loaded(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; check the path") from None
    except CheckpointError as error:  # it names the path itself
        raise UsageError(str(error)) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _loaded(path: Path) -> Any:
    """What stands in the file, as plain values."""
    text = read_small(path, _LONGEST, "name a config in YAML")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (
        yaml.YAMLError,
        AttributeError,  # of tags that do not fit their values, as LookupError and TypeError
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split()) or "it nests too deep"
        raise UsageError(f"is no config in YAML ({reason}); mend it") from None
