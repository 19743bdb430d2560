"""Prompts in, tokens out: prefill, then token after token until each sequence has its reason to stop.

Every rank of a layout runs this in step with the others. The last one, which has the logits, chooses
the tokens and tells them to all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gptoss_convert.errors import ConvertError, UsageError
from gptoss_plugins.infer.cache import Mark
from gptoss_plugins.infer.graphs import GraphedStep, can_capture
from gptoss_plugins.infer.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from gptoss_plugins.infer.cache import Cache
    from gptoss_plugins.infer.decoder import Decoder

PREFILL_TOKENS = 16384  # of all sequences, in one pass through the layers
STAGE_TOKENS = 4096  # likewise where there are stages, which work on different passes at a time
_WORTH_CAPTURING = 8  # tokens
_NO_NUMBER = -1  # in place of a token, where logits are none


@dataclass
class Completion:
    """What was made of one prompt.

    Attributes:
        prompt: its token ids.
        ids: the new ones, the one that ended it included.
        reason: why it ended: ``stop`` (a stop id), ``text`` (the caller said so), ``length``
            (as many tokens as were asked for), ``context`` (the model takes no more).

    """

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass
class Timing:
    """Seconds and tokens of a call.

    Attributes:
        first_token: seconds until every sequence had its first token.
        decoding: seconds after that.
        prompt_tokens: read in this call; what the cache had from the call before is not among them.
        new_tokens: made, of all sequences.
        new_tokens_after_first: the same without each sequence's first.
        steps: passes through the layers after the first token.

    """

    first_token: float = 0.0
    decoding: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    new_tokens_after_first: int = 0
    steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, first tokens left out; 0 if there were no others."""
        return self.new_tokens_after_first / self.decoding if self.decoding else 0.0


class Engine:
    """A model that continues text.

    Args:
        decoder: this rank's part.
        longest: tokens that the model takes at most, prompt and answer together.
        stop_ids: token ids that end a sequence.

    """

    def __init__(self, decoder: Decoder, longest: int, stop_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self.longest = longest
        self.stop_ids = frozenset(stop_ids)
        self._kept: _Kept | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        sampling: Sampling | None = None,
        watch: Callable[[int, int], bool] = lambda number, token: False,
    ) -> tuple[list[Completion], Timing]:
        """Continue prompts.

        A single prompt that begins as the one before did takes up what the cache has of it.

        Args:
            prompts: token ids of each; none may be empty.
            new_tokens: at most, for each.
            sampling: how tokens are chosen; the most likely ones by default.
            watch: is called with each new token and the number of its prompt, on all ranks; what it
                returns must be the same on all of them, and True ends the sequence.

        Raises:
            UsageError: a prompt is empty, or longer than the model takes.

        """
        self.check(prompts)
        started = time.monotonic()
        done, timing = [Completion(list(p)) for p in prompts], Timing()
        longest = max(map(len, prompts))
        room = min(new_tokens, self.longest - longest)
        if room < 1:
            return self._unchanged(done, new_tokens), timing
        sampler = Sampler(sampling or Sampling(), len(prompts))
        cache, fresh = self._cache_for(prompts, longest + room)
        timing.prompt_tokens = sum(map(len, fresh))
        logits = self._prefill(fresh, cache)
        mark = Mark(cache) if len(prompts) == 1 else None
        token = self._chosen(logits, sampler, len(prompts))
        if token.is_cuda:
            torch.cuda.synchronize()
        timing.first_token = time.monotonic() - started
        going: list[bool] = []
        graph, counts = None, token
        while True:
            self._take(token, done, new_tokens, room, watch)
            before, going = going, [not one.reason for one in done]
            if not any(going):
                break
            if going != before:
                counts = torch.tensor(going, dtype=torch.int64, device=self._decoder.device)
            if graph is None and room >= _WORTH_CAPTURING and can_capture(self._decoder):
                graph = GraphedStep(self._decoder, cache)
            step = token[:, None]
            logits = graph.step(step, counts) if graph else self._decoder.step(step, counts, cache)
            token = self._chosen(logits, sampler, len(prompts))
            timing.steps += 1
        timing.decoding = time.monotonic() - started - timing.first_token
        timing.new_tokens = sum(len(one.ids) for one in done)
        timing.new_tokens_after_first = timing.new_tokens - len(done)
        if mark:
            self._kept = _Kept(cache, done[0].prompt, done[0].ids[:-1], mark)
        return done, timing

    def forget(self) -> None:
        """Give the cache of the last prompt back."""
        self._kept = None

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise UsageError if a prompt is empty, or longer than the model takes."""
        for number, prompt in enumerate(prompts, 1):
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            if not prompt:
                raise UsageError(f"{which} is empty; give it at least one token")
            if len(prompt) > self.longest:
                raise UsageError(
                    f"{which} has {len(prompt)} tokens, and the model takes {self.longest} at most, "
                    f"its answer included; shorten it"
                )

    def _unchanged(self, done: list[Completion], new_tokens: int) -> list[Completion]:
        for one in done:
            one.reason = "length" if new_tokens < 1 else "context"
        return done

    def _cache_for(
        self, prompts: Sequence[Sequence[int]], capacity: int
    ) -> tuple[Cache, list[Sequence[int]]]:
        """A cache, and what of the prompts it does not have yet."""
        kept, self._kept = self._kept, None
        if kept and len(prompts) == 1 and kept.cache.shape.capacity > capacity:
            seen = kept.go_back_to(prompts[0])
            if seen:
                return kept.cache, [prompts[0][seen:]]
        del kept  # before there is a second one
        spare = capacity + 1  # a sequence that is done writes behind its end
        if len(prompts) == 1:  # and a conversation goes on
            spare = min(2 * capacity, self.longest) + 1
        return self._decoder.cache(len(prompts), spare), list(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor | None:
        """Logits after each prompt's last token, on the ranks that have logits."""
        sizes = [len(prompt) for prompt in prompts]
        rows = np.zeros((len(prompts), max(sizes)), dtype=np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = prompt  # torch takes 9 ms for 32,768 ids, NumPy 1.3
        # All at once: a copy to a GPU waits until it has done all that it was given before.
        ids = torch.from_numpy(rows).to(self._decoder.device)
        lengths = torch.tensor(sizes, device=self._decoder.device)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        width = max(1, (STAGE_TOKENS if stages > 1 else PREFILL_TOKENS) // len(prompts))
        found = None
        for start in range(0, ids.shape[1], width):
            counts = (lengths - start).clamp(0, width)
            logits = self._decoder.step(ids[:, start : start + width], counts, cache)
            if logits is not None:
                found = logits if found is None else torch.where(counts[:, None] > 0, logits, found)
        return found

    def _chosen(self, logits: Tensor | None, sampler: Sampler, batch: int) -> Tensor:
        """The next token of every sequence: int64 ``[b]``, the same on all ranks."""
        last = dist.get_world_size() - 1  # is in the last stage, whatever the layout
        if logits is not None and (last == 0 or dist.get_rank() == last):
            is_sound = logits.isfinite().all(-1)
            token = sampler.choose(logits.where(is_sound[:, None], 0)).where(is_sound, _NO_NUMBER)
        else:
            token = torch.empty(batch, dtype=torch.int64, device=self._decoder.device)
        if last:
            dist.broadcast(token, last)
        return token

    def _take(
        self,
        token: Tensor,
        done: list[Completion],
        new_tokens: int,
        room: int,
        watch: Callable[[int, int], bool],
    ) -> None:
        """Append the tokens, and note who has reason to stop."""
        for number, (one, new) in enumerate(zip(done, token.tolist(), strict=True)):
            if one.reason:
                continue
            if new == _NO_NUMBER:
                raise ConvertError(
                    "the model's logits are NaN or infinite: its weights are damaged (verify says "
                    "where), or --torch-dtype is too small for them"
                )
            one.ids.append(new)
            wants_end = watch(number, new)
            if new in self.stop_ids:
                one.reason = "stop"
            elif wants_end:
                one.reason = "text"
            elif len(one.ids) == room:
                one.reason = "length" if room == new_tokens else "context"


class _Kept:
    """The cache of the last single prompt: its ids, its answer's, and the point between them.

    The answer's last token was never read by the model.
    """

    def __init__(self, cache: Cache, prompt: list[int], answer: list[int], mark: Mark) -> None:
        self.cache = cache
        self._prompt, self._answer, self._mark = prompt, answer, mark

    def go_back_to(self, prompt: Sequence[int]) -> int:
        """Make the cache hold the beginning of another prompt; how many tokens that is, 0 for none."""
        whole = [*self._prompt, *self._answer]
        if len(prompt) > len(whole) and list(prompt[: len(whole)]) == whole:
            return len(whole)
        if len(prompt) > len(self._prompt) and list(prompt[: len(self._prompt)]) == self._prompt:
            self._mark.restore()
            return len(self._prompt)
        return 0
