"""Samples of running text have masks of their own, whichever was read first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core, about what is not installed


def samples() -> Any:
    from gptoss_plugins.train.recipes import tiny_pretrain_config
    from gptoss_plugins.train.run.text import Tokens, text_datasets

    config = tiny_pretrain_config().having(train={"train_iters": 30, "eval_iters": 2})
    train, _ = text_datasets(
        config, Tokens("few", 50, eod=47, pad=3)
    )  # pad occurs in random tokens
    return train


def test_a_sample_does_not_depend_on_those_before_it() -> None:
    read_first = {number: samples()[number] for number in (5, 7, 11)}
    in_turn = samples()
    masks = []
    for number in range(12):
        sample = in_turn[number]
        masks.append(sample["loss_mask"])
        for name, tensor in read_first.get(number, {}).items():
            assert tensor.equal(sample[name]), (number, name)
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    assert all(bool((mask == 0).any()) for mask in masks)
    assert all(torch.isin(mask, torch.tensor([0.0, 1.0])).all() for mask in masks)
