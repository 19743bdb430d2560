"""A conversation, cut into samples in each of which the model reads what it would at inference.

There the thinking of an answer is gone as soon as the answer is final. So a turn that thinks ends a
sample: in what follows it stands without its thinking, as context that is not learned again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from gptoss_plugins.data.sft.harmony import ASSISTANT
from gptoss_plugins.infer.completion import ANALYSIS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from gptoss_plugins.data.sft.harmony import Said


def samples_of(
    messages: Sequence[Said], channels: Collection[str], dropped: Collection[str]
) -> Iterator[list[Said]]:
    """Conversations to write, each up to the last message that is learned in it.

    Args:
        messages: all that is said; ``learned`` where the record lets it be.
        channels: of the assistant's messages that are learned.
        dropped: channels that are left out.

    """
    turns = _turns(messages)
    thinks = {
        turn
        for turn, message in zip(turns, messages, strict=True)
        if message.channel == ANALYSIS and ANALYSIS not in dropped
    }
    last = max(turns, default=0)
    edges = [-1, *sorted(thinks - {last}), last]
    for before, end in pairwise(edges):
        sample = [
            replace(
                message,
                learned=message.learned
                and message.author == ASSISTANT
                and message.channel in channels
                and turn > before,
            )
            for turn, message in zip(turns, messages, strict=True)
            if turn <= end
            and message.channel not in dropped
            and (message.channel != ANALYSIS or turn == end)
        ]
        while sample and not sample[-1].learned:
            sample.pop()
        if sample:
            yield sample


def _turns(messages: Sequence[Said]) -> list[int]:
    """The number of each message's turn; a final answer is the last message of one."""
    found, turn = [], 0
    for message in messages:
        found.append(turn)
        turn += message.is_answer
    return found
