"""``verify`` by several processes that share only a folder: each reads some of the tensors.

They leave what they found in a folder below the current one, and the last one puts it together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import write_note
from gptoss_convert.compare import Difference
from gptoss_convert.crew import Crew, claim
from gptoss_convert.types import Finding
from gptoss_plugins.verify.values import Compared, Values

if TYPE_CHECKING:
    from gptoss_convert.logical import Logical

log = logging.getLogger("gptoss_convert")


def together(values: Values, crew: Crew, first: Logical, second: Logical | None) -> Values | None:
    """Leave a share's result, and take up all of them if this is the last.

    Args:
        values: of this process's share.
        crew: the processes.
        first: a checkpoint; results of the others are told by which ones they are of.
        second: what it is compared with.

    Returns:
        what all processes found, in one of them; None in the others.

    """
    if crew.size == 1:
        return values
    facts = [one.source.fingerprint() for one in (first, second) if one]
    key = hashlib.sha256("\n".join([*facts, str(crew.size)]).encode()).hexdigest()[:16]
    folder = Path(f".gptoss-verify-{key}")
    write_note(folder / f"{crew.rank}.json", _dumped(values))
    files = [folder / f"{rank}.json" for rank in range(crew.size)]
    is_last = all(file.exists() for file in files)
    try:
        held = claim(folder / "merge") if is_last else None  # let go of when the process ends
    except FileNotFoundError:  # another one is done with it
        held = None
    if held is None:
        log.info(
            "process %d of %d has read its share; the last one to finish tells the result",
            crew.rank,
            crew.size,
        )
        return None
    found = _merged([json.loads(file.read_bytes()) for file in files], first)
    shutil.rmtree(folder)
    return found


def _dumped(values: Values) -> bytes:
    tensors = [dataclasses.asdict(tensor) for tensor in values.tensors.values()]
    findings = [dataclasses.asdict(finding) for finding in values.findings]
    return json.dumps({"tensors": tensors, "findings": findings}).encode()


def _merged(shares: list[dict[str, Any]], first: Logical) -> Values:
    """In the table's order, whoever read what."""
    tensors = {}
    for tensor in (t for share in shares for t in share["tensors"]):
        sums = tensor.pop("difference")
        sums = {k: tuple(v) if isinstance(v, list) else v for k, v in sums.items()}
        shape, dtypes = tuple(tensor.pop("shape")), tuple(tensor.pop("dtypes"))
        tensors[tensor["name"]] = Compared(
            **tensor, shape=shape, dtypes=dtypes, difference=Difference(**sums)
        )
    order = [name for key in first.steps for name in key if name in tensors]
    findings = [Finding(**finding) for share in shares for finding in share["findings"]]
    place = {name: number for number, name in enumerate(order)}
    findings.sort(key=lambda finding: place.get(finding.where, -1))
    return Values({name: tensors[name] for name in order}, findings)
