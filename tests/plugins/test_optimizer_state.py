"""The optimizer's state in checkpoints: what each rank holds, as it is, for any layout to read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed
RANKS = Path(__file__).parents[1] / "support" / "optimizer_ranks.py"


@settings(deadline=None)  # the first one imports megatron-core
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_boxes_are_the_run(shape: list[int], data: st.DataObject) -> None:
    """Put into the tensor one after the other, the elements are where they were."""
    from gptoss_plugins.train.run.optimizer_state import boxes

    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    run = torch.arange(start, stop)
    found, at = torch.full(shape, -1), 0
    for offset, lengths in boxes(tuple(shape), start, stop):
        one = tuple(slice(a, a + b) for a, b in zip(offset, lengths, strict=True))
        count = math.prod(lengths)
        assert count > 0
        found[one] = run[at : at + count].view(lengths)
        at += count
    wanted = torch.full((size,), -1)
    wanted[start:stop] = run
    assert at == stop - start
    assert torch.equal(found.flatten(), wanted)


@pytest.mark.parametrize(
    ("key", "holds"),
    [("decoder.final_layernorm.weight", "one of shape"), ("optimizer.state.param.a", "none")],
)
def test_master_weights_of_another_model(imported: Path, key: str, holds: str) -> None:
    from gptoss_convert.errors import CheckpointError
    from gptoss_plugins.megatron.source import TorchDistSource
    from gptoss_plugins.train.run.optimizer_state import Later, read_later

    box = SimpleNamespace(key=key, global_shape=(5, 7))
    later = Later(box, None, None, 0)  # type: ignore[arg-type]  # nothing of it is reached
    with pytest.raises(CheckpointError, match=rf"{key} is due with shape \[5, 7\], .* {holds}"):
        read_later(TorchDistSource(imported), [later])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "ep"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.slow)], ids=["dp3", "dp4 ep2"]
)
def test_ours_and_megatron_cores_read_each_other(ranks: int, ep: int, tmp_path: Path) -> None:
    """All elements of all states, where ranks' parts begin and end anywhere."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, str(RANKS), str(tmp_path), str(ep)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compared = json.loads(done.stdout)
    assert len(compared) == ranks
    assert min(compared) > 10_000
