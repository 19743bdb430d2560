"""Gloo worlds of one to eight processes, one after the other, one for each layout.

Prints a JSON object: the layouts that were compared, none if one was wrong. megatron-core is
imported once and the ranks are forked from there; a world of three leaves five of them waiting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from multiprocessing import connection
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from megatron_ranks import Whole, check_rank, check_replicas, layouts, sizes_for
from rank_models import groups

from gptoss_convert.layout import Layout

Job = tuple[Layout, str]


def jobs(ranks: int) -> list[Job]:
    """Every layout with the modules that can have it: experts with biases have no ETP in ours."""
    ours = [(layout, "ours") for layout in layouts(ranks, chunks=2) if layout.etp == 1]
    stock = [(layout, "stock") for layout in layouts(ranks, chunks=1) if layout.etp > 1]
    return [*ours, *stock]


def compare(job: Job) -> None:
    """In the world there is: this rank's pieces, and on the first rank everybody's replicas."""
    layout, kind = job
    whole = Whole(sizes_for(layout), layout)
    with groups(layout):
        held = check_rank(whole, kind)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, held)
    if dist.get_rank() == 0:
        check_replicas(whole, everyone)


def run(rank: int, work: list[Job], stores: Path) -> None:
    """One process's part; a world it cannot be in is left to the others."""
    torch.set_num_threads(1)
    for number, job in enumerate(work):
        world = job[0].world
        if rank >= world:
            continue
        store = dist.FileStore(str(stores / str(number)), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        try:
            compare(job)
        except BaseException:
            print(f"rank {rank} of {job}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # at once: an orderly end would wait for the other ranks
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    work = jobs(args.ranks)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=run, args=(n, work, Path(folder)), daemon=True)
            for n in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        failed = wait_for(ranks)
    done = [f"{kind}: {layout}" for layout, kind in work]
    print(json.dumps({"layouts": [] if failed else done, "failed": failed}))
    return int(failed)


def wait_for(processes: list[Any]) -> bool:
    """Until all have ended, or one of them badly: the others would wait for it."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(list(running)):
            if running.pop(sentinel).exitcode:
                for process in running.values():
                    process.kill()
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
