"""What was found out about a finished group, put aside in the unfinished folder: for a later run that
goes on from there, and for the one among several processes that puts the result in place.

A note is there before its group gets its final name, so that whoever finds the group finds the note.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from gptoss_convert import loss
from gptoss_convert.blockio import write_note
from gptoss_convert.checksums import listening
from gptoss_convert.manifest import files_from_json, files_to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gptoss_convert.checksums import FileSum
    from gptoss_convert.loss import Loss
    from gptoss_convert.plan import Group
    from gptoss_convert.spoiled import Spoiled

LOSS = ".loss-"  # prefixes of the notes: what encoding a group lost,
FOUND = ".spoiled-"  # what it read that was not finite,
SUMS = ".sums-"  # and the checksums of its files


class Notes:
    """The notes of one conversion.

    Args:
        folder: where they are kept; None keeps none.
        spoiled: takes what was read that is not finite.

    Attributes:
        losses: what encoding lost, by tensor.
        sums: the checksums of the files written so far, by name in the folder.

    """

    def __init__(self, folder: Path | None, spoiled: Spoiled) -> None:
        self.folder, self.spoiled = folder, spoiled
        self.losses: dict[str, Loss] = {}
        self.sums: dict[str, FileSum] = {}

    def keep(self, group: Group, losses: Mapping[str, Loss], spoiled: Spoiled) -> None:
        """Keep what was found out while a group was written, before it becomes final."""
        self.losses |= losses
        self.spoiled.merge(spoiled)
        if self.folder is None:
            return
        if losses:
            loss.save(self._at(LOSS, group, ".json"), losses)
        spoiled.save(self._at(FOUND, group))

    def complete(self, group: Group) -> None:
        """Note that a group is final, for a sink that writes its files in a way of its own."""
        if self.folder is not None and not self._at(SUMS, group, ".json").exists():
            self._keep_sums(group, {})

    @contextlib.contextmanager
    def listening(self, group: Group | None = None) -> Iterator[None]:
        """Within it, take the checksums of the files that this thread writes, as part of a group."""
        if self.folder is None:
            yield
            return
        root: Path = self.folder
        found: dict[str, FileSum] = {}

        def take(path: Path, total: FileSum) -> None:
            if path.is_relative_to(root):
                found[path.relative_to(root).as_posix()] = total
                self._keep_sums(group, found)

        with listening(take):
            yield

    def _keep_sums(self, group: Group | None, found: Mapping[str, FileSum]) -> None:
        self.sums |= found
        if group:
            text = json.dumps(files_to_json(found))
            write_note(self._at(SUMS, group, ".json"), text.encode())

    def are_there(self, group: Group) -> bool:
        """Whether a group that is done needs not be done again to know what was found out. Notes are
        removed just before the folder is put in place, and a run can end in between.
        """
        if self.folder is None:
            return not _is_encoded(group)
        needed = [self._at(SUMS, group, ".json")]
        needed += [self._at(LOSS, group, ".json")] if _is_encoded(group) else []
        return all(path.exists() for path in needed)

    def recall(self, group: Group) -> bool:
        """Take up the notes of a group; False if they are not all there."""
        if not self.are_there(group):
            return False
        if self.folder is not None:
            self.spoiled.load(self._at(FOUND, group))
            self.sums |= files_from_json(json.loads(self._at(SUMS, group, ".json").read_bytes()))
            if _is_encoded(group):
                self.losses |= loss.load(self._at(LOSS, group, ".json"))
        return True

    def _at(self, prefix: str, group: Group, suffix: str = "") -> Path:
        assert self.folder is not None
        return self.folder / f"{prefix}{flat(group)}{suffix}"


def _is_encoded(group: Group) -> bool:
    return any(output.codec for step in group.steps for output in step.outputs)


def flat(group: Group) -> str:
    """A group's name as one file's."""
    return group.name.replace("/", "-")
