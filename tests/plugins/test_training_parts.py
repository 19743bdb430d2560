"""What training computes by ways of its own, beside plain torch: attention over packed rows, the loss."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed

S, B, HEADS, GROUPS, SIZE = 37, 3, 6, 2, 16
SCALE = 0.31


def noise(seed: int, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def starts() -> Tensor:
    """Of three rows, one whole: where the sequence of each position starts."""
    cuts = torch.zeros(B, S, dtype=torch.int64)
    cuts[1, 11:] = 11
    cuts[1, 30:] = 30
    cuts[2, 5:] = 5
    return cuts


def plain(
    tensors: list[Tensor], sinks: Tensor | None, left: int | None, of: Tensor | None
) -> Tensor:
    """Query by query, key by key: the formula, written down."""
    query, key, value = tensors
    rows = []
    for i in range(S):
        at = []
        for b in range(B):
            low = max(0 if left is None else i - left, 0 if of is None else int(of[b, i]))
            heads = []
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                scores = key[low : i + 1, b, g] @ query[i, b, h] * SCALE
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                probs = scores.softmax(0)[: i + 1 - low]
                heads.append(probs @ value[low : i + 1, b, g])
            at.append(torch.cat(heads))
        rows.append(torch.stack(at))
    return torch.stack(rows)


@pytest.mark.parametrize("way", ["by_blocks", "flex"])
@pytest.mark.parametrize("left", [None, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sunk", [False, True])
def test_attention(way: str, left: int | None, packed: bool, sunk: bool, monkeypatch: Any) -> None:
    from gptoss_plugins.gpt_model import by_blocks, flex

    monkeypatch.setattr(by_blocks, "QUERIES", 10)  # several blocks, the last one short
    attend = {"by_blocks": by_blocks, "flex": flex}[way].attend
    tensors = [
        noise(1, S, B, HEADS, SIZE),
        noise(2, S, B, GROUPS, SIZE),
        noise(3, S, B, GROUPS, SIZE),
    ]
    sinks = noise(4, HEADS) if sunk else None
    of = starts() if packed else None
    inputs = [*tensors, *([] if sinks is None else [sinks])]
    there = "cuda" if way == "flex" and torch.cuda.is_available() else "cpu"
    has_backward = way == "by_blocks" or there == "cuda"  # torch's flex attention, on CUDA only
    moved = [one.to(there) if has_backward else one.detach() for one in inputs]
    of = None if of is None else of.to(there)
    made = attend(*moved[:3], moved[3] if sunk else None, scale=SCALE, left=left, starts=of)
    wanted = plain(tensors, sinks, left, None if of is None else of.cpu())
    torch.testing.assert_close(made.cpu(), wanted, rtol=0, atol=1e-5)
    if not has_backward:
        return
    back = noise(5, *made.shape).detach()
    ours = torch.autograd.grad(made, inputs, back.to(there))
    theirs = torch.autograd.grad(wanted, inputs, back)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


class Alone:
    """A group of one rank, or a rank of several that is asked alone."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_loss_in_chunks(rows: int, monkeypatch: Any) -> None:
    from gptoss_plugins.gpt_model import loss as module

    tokens, hidden_size, vocabulary = 23, 12, 41
    monkeypatch.setattr(module, "ELEMENTS", rows * vocabulary)
    hidden, weight = noise(1, tokens, hidden_size), noise(2, vocabulary, hidden_size)
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(4))
    weights[[0, 9, 22]] = 0
    found = module.weighted_loss(hidden, weight, labels, weights, Alone())
    counted = weights > 0
    losses = torch.nn.functional.cross_entropy(
        hidden[counted] @ weight.T, labels[counted], reduction="none"
    )
    wanted = (losses * weights[counted]).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    ours = torch.autograd.grad(found * 0.37, [hidden, weight])
    theirs = torch.autograd.grad(wanted * 0.37, [hidden, weight])
    torch.testing.assert_close(ours[0][counted], theirs[0][counted])
    assert not ours[0][~counted].any()
    torch.testing.assert_close(ours[1], theirs[1])


def test_no_weight_no_gradient_for_it() -> None:
    """As where adapters are trained, and the base is frozen."""
    from gptoss_plugins.gpt_model.loss import weighted_loss

    hidden, weight = noise(1, 5, 4), noise(2, 9, 4).detach()
    found = weighted_loss(hidden, weight, torch.arange(5), torch.ones(5), Alone())
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(5), reduction="sum")
    found.backward()
    (theirs,) = torch.autograd.grad(wanted, [hidden])
    torch.testing.assert_close(hidden.grad, theirs)


def test_flops_are_those_counted_by_torch() -> None:
    """Forward products of a tiny model, counted by torch, with all keys that are computed."""
    from torch.utils.flop_counter import FlopCounterMode

    from gptoss_convert.layout import Layout
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.gpt_model.live import build_live
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.architecture import megatron_fields
    from gptoss_plugins.train.config import ModelConfig
    from gptoss_plugins.train.run.figures import flops_per_token

    fields = megatron_fields(ModelConfig(size="tiny")) | {"window_size": None}
    length = 96
    with world_of(Layout(), "cpu", schedules=False) as place:
        model = build_live(
            fields, Layout(), default_registry(), place, torch.float32, random_weights=True
        ).models[0]
        ids = torch.arange(length)[None]
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            model(ids, ids, None)
    queries = fields["num_attention_heads"] * fields["kv_channels"]
    hidden_keys = (length - 1) / 2  # computed, then masked, in plain torch
    wasted = 4 * queries * hidden_keys * fields["num_layers"]
    ours = flops_per_token(fields, length) / 3 + wasted
    assert counted.get_total_flops() / length == pytest.approx(ours, rel=1e-9)


def test_a_blend_that_is_not_there(tmp_path: Any) -> None:
    from gptoss_convert.errors import CheckpointError
    from gptoss_plugins.train.recipes import tiny_pretrain_config
    from gptoss_plugins.train.run.text import Tokens, text_datasets

    (tmp_path / "text.bin").touch()
    for name, message in [
        ("gone", r"gone\.bin: is not there; dataset\.blend names prefixes of \.bin and \.idx"),
        ("text", r"text\.idx: is not there; dataset\.blend names prefixes of \.bin and \.idx"),
        ("text.bin", r"names prefixes, so say \S*/text$"),
        ("text.idx", r"names prefixes, so say \S*/text$"),
    ]:
        config = tiny_pretrain_config().having(dataset={"blend": ((str(tmp_path / name),), None)})
        with pytest.raises(CheckpointError, match=message):
            text_datasets(config, Tokens("bytes", 272, 256, 257))


TOLD_TWICE = """
import signal
import torch
from gptoss_plugins.gpt_model.termination import Termination
from gptoss_plugins.train.config import TrainConfig
from gptoss_plugins.train.run.stopping import Stop

termination = Termination()
with Stop(TrainConfig(exit_signal_handler=True), torch.device("cpu")):
    signal.raise_signal(signal.SIGTERM)
    termination.look()
for _ in range(9):
    termination.look()
signal.raise_signal(signal.SIGTERM)  # by the launcher, where Slurm was faster
termination.close()
signal.raise_signal(signal.SIGTERM)
print("said how it ended")
"""


def test_a_run_that_was_told_to_stop_says_how_it_ended() -> None:
    found = subprocess.run(
        [sys.executable, "-c", TOLD_TWICE], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "said how it ended\n"), found.stderr
