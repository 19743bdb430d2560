"""``manifest.json``: where a folder comes from, and the checksum of every file and tensor in it.

Its bytes depend on what was converted and how, never on when, where, by how many processes, or in
how many attempts. The last line is a checksum of all before it, so that it vouches for itself too.
docs/json.md has the form.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from gptoss_convert.checksums import ALGORITHM, FileSum, Span
from gptoss_convert.errors import CheckpointError
from gptoss_convert.untrusted import no_duplicates, read_small

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MANIFEST = "manifest.json"
SCHEMA = "gptoss-convert.manifest/1"
_LARGEST = 256 << 20  # of 120B cut for many ranks it has a few MB
_SEAL = re.compile(rb',\n "seal": "([0-9a-f]{32})"\n}\n\Z')
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        origin: tool, plugins, source and options.
        files: by name in the folder, the manifest itself left out.

    """

    origin: Mapping[str, Any]
    files: Mapping[str, FileSum]

    def dump(self) -> bytes:
        """The bytes of ``manifest.json``."""
        said = {"schema": SCHEMA, "algorithm": ALGORITHM, **self.origin}
        text = json.dumps({**said, "files": files_to_json(self.files)}, indent=1)
        body = text.removesuffix("\n}").encode()
        return body + f',\n "seal": "{xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def files_to_json(files: Mapping[str, FileSum]) -> dict[str, Any]:
    """Plain values, by name and in the order of names."""
    return {
        name: {
            "bytes": files[name].nbytes,
            "digest": files[name].digest,
            "tensors": [
                {"name": span.name, "place": [span.offset, span.nbytes], "digest": digest}
                for span, digest in files[name].tensors.items()
            ],
        }
        for name in sorted(files)
    }


def files_from_json(value: Any) -> dict[str, FileSum]:
    """The inverse of :func:`files_to_json`, which believes nothing.

    Raises:
        ValueError: it is nothing of the kind, or no such files can be.

    """
    return {_file_name(name): _file(name, facts) for name, facts in _fields(value).items()}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        CheckpointError: it is missing, damaged, or says what cannot be.

    """
    path = folder / MANIFEST
    try:
        data = read_small(path, _LARGEST, "remove it")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing, so there is nothing to check against; give a folder that "
            f"gptoss-convert wrote, its root"
        ) from None
    try:
        return _parsed(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is damaged, or no manifest of ours ({error}); copy the folder again, or "
            f"convert again"
        ) from None


def root_of(folder: Path) -> Path | None:
    """Where the manifest is that tells of a folder: in it, or above, as with an iteration's folder."""
    here = folder.resolve()
    for root in (here, *here.parents[:2]):
        if not (root / MANIFEST).is_file():
            continue
        try:
            files = read_manifest(root).files
        except CheckpointError:
            return root  # whoever reads it is told
        if any((root / name).is_relative_to(here) for name in files):
            return root
    return None


def _parsed(data: bytes) -> Manifest:
    seal = _SEAL.search(data[-64:])
    if not seal:
        raise ValueError("it does not end in a seal")
    if xxh3_128_hexdigest(data[: -len(seal[0])]).encode() != seal[1]:
        raise ValueError("its seal does not match what it says")
    value = json.loads(data, object_pairs_hook=no_duplicates)
    said = {name: fact for name, fact in value.items() if name != "seal"}
    if (schema := said.pop("schema", None)) != SCHEMA:
        raise ValueError(f"its schema is {str(schema)[:80]!r}, not {SCHEMA!r}")
    if (algorithm := said.pop("algorithm", None)) != ALGORITHM:
        raise ValueError(f"its checksums are {str(algorithm)[:80]!r}, not {ALGORITHM!r}")
    return Manifest(said, files_from_json(said.pop("files", None)))


def _file_name(name: str) -> str:
    """A path below the folder, spelled in the one way we spell it."""
    path = PurePosixPath(name)
    if path.is_absolute() or str(path) != name or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no name of a file in the folder")
    if name in (".", MANIFEST):
        raise ValueError(f"{name!r} can have no checksum in it")
    return name


def _file(name: str, value: Any) -> FileSum:
    facts = _fields(value)
    size, tensors = _count(facts.get("bytes")), facts.get("tensors")
    if not isinstance(tensors, list):
        raise ValueError(f"{name[:80]!r} has no list of tensors")
    found = dict(map(_tensor, tensors))
    _require_apart(found, size, name)
    if len(found) != len(tensors):
        raise ValueError(f"{name[:80]!r} has a tensor twice")
    return FileSum(size, _digest(facts.get("digest")), found)


def _tensor(value: Any) -> tuple[Span, str]:
    facts = _fields(value)
    name, place = facts.get("name"), facts.get("place")
    if not isinstance(name, str) or not isinstance(place, list) or len(place) != 2:
        raise ValueError("a tensor without a name or a place")
    return Span(name, _count(place[0]), _count(place[1])), _digest(facts.get("digest"))


def _require_apart(spans: Iterable[Span], size: int, name: str) -> None:
    """One behind the other, all in the file."""
    end = 0
    for span in spans:
        if span.offset < end or span.end > size:
            raise ValueError(f"the tensors of {name[:80]!r} overlap, or pass its end")
        end = span.end


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("something is no JSON object where one belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:80]!r} is no number of bytes")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is no checksum")
    return value
