"""What decides the tokens of records, as text: two runs that have the same plan make the same."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from gptoss_plugins.data.sft.packed_file import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_plugins.data.sft.tokenizing import Job
    from gptoss_plugins.data.units import Unit


def plan_of(units: Sequence[Unit], job: Job) -> str:
    """The inputs, as they are now, the form and the tokenizer."""
    files = [
        [str(unit.path.absolute()), unit.start, unit.stop, unit.path.stat().st_mtime_ns]
        for unit in units
    ]
    return json.dumps([SCHEMA, files, dataclasses.asdict(job.form), job.tokenizer.digest])
