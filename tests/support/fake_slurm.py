"""Slurm's programs as bash scripts that only write down what they are told to start."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def path_with(folder: Path, **programs: str) -> str:
    """``$PATH`` with a folder before it, which gets programs: names, and what they do in bash."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}:{os.environ['PATH']}"


def job_of(folder: Path, srun: str) -> dict[str, str]:
    """The environment of a job on two nodes.

    Args:
        folder: gets the programs; ``$SEEN`` is a file in it.
        srun: what that does, in bash.

    """
    tools = folder / "tools"
    tools.mkdir()
    return {
        "PATH": path_with(tools, srun=srun, scontrol="echo node-7; echo node-8"),
        "SEEN": str(folder / "seen"),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
    }
