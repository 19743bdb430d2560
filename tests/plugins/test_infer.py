"""The engine's parts: what a step costs, what a cache keeps, how tokens are drawn, where a text ends."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gptoss_convert.errors import UsageError
from gptoss_plugins.infer.answer import Answer
from gptoss_plugins.infer.sampling import Sampler, Sampling, probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

# megatron-core warns at import that Transformer Engine and Apex are missing.
pytestmark = pytest.mark.filterwarnings("ignore")

SUPPORT = Path(__file__).parents[1] / "support"
WINDOW, LAYERS, VOCAB = 9, 6, 134


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SUPPORT / "tiny_gptoss.py")))


@pytest.fixture(scope="module")
def hf(tiny: SimpleNamespace) -> Any:
    model = tiny.tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def decoder(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of transformers' model, read from its own checkpoint."""
    from gptoss_convert.layout import Layout
    from gptoss_convert.logical import open_logical
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import default_registry
    from gptoss_plugins.gpt_model.filling import fill
    from gptoss_plugins.gpt_model.live import build_live
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.infer.decoder import Decoder

    folder, registry, alone = tmp_path_factory.mktemp("hf"), default_registry(), Layout()
    hf.save_pretrained(folder)
    checkpoint = open_logical(folder, registry, Choice())
    with world_of(alone, "cpu", schedules=False) as place:
        live = build_live(checkpoint.fields, alone, registry, place, torch.float32)
        fill(live, checkpoint)
        yield Decoder(live.models[0], VOCAB)


def engine_of(decoder: Any, longest: int = 2048, stops: tuple[int, ...] = ()) -> Any:
    from gptoss_plugins.infer.engine import Engine

    return Engine(decoder, longest, stops)


def ids(count: int, seed: int = 1) -> list[int]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=noise).tolist()


def expected(hf: Any, prompt: list[int], count: int) -> list[int]:
    row = torch.tensor([prompt])
    mask = torch.ones_like(row)
    made = hf.generate(row, attention_mask=mask, max_new_tokens=count, do_sample=False)
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


# --- what a step costs ---------------------------------------------------------------------------


def operations(decoder: Any, prefix: int) -> Counter[str]:
    """Multiplications and additions of one decoding step, by kind of layer and for the rest."""
    cache = decoder.cache(1, 800)
    decoder.step(torch.tensor([ids(prefix)]), torch.tensor([prefix]), cache)
    found: Counter[str] = Counter()
    original = decoder._attended

    def attended(attention: Any, *rest: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            made = original(attention, *rest)
        kind = "full" if attention.core_attention.left is None else "window"
        found[kind] += counter.get_total_flops()
        return made

    decoder._attended = attended
    try:
        with FlopCounterMode(display=False) as counter:
            decoder.step(torch.tensor([[3]]), torch.tensor([1]), cache)
    finally:
        del decoder._attended
    found["rest"] = counter.get_total_flops() - found["full"] - found["window"]
    return found


def test_a_step_reads_no_prefix_again(decoder: Any) -> None:
    """Window layers cost the same at any length, full ones grow by the same for every token, and
    everything else does not know how long the prefix is.
    """
    short, middle, long = (operations(decoder, n) for n in (100, 300, 700))
    assert short["window"] == middle["window"] == long["window"] > 0
    assert (middle["full"] - short["full"]) * 2 == long["full"] - middle["full"] > 0
    assert short["rest"] == middle["rest"] == long["rest"] > 0


def test_a_batch_costs_its_own_tokens(decoder: Any) -> None:
    """Padding of a short prompt beside a long one goes through no linear and no expert."""

    def rest(lengths: list[int]) -> int:
        cache = decoder.cache(len(lengths), 300)
        rows = [ids(n) + [0] * (max(lengths) - n) for n in lengths]
        original, inside = decoder._attended, Counter[str]()

        def attended(*given: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                made = original(*given)
            inside["attention"] += counter.get_total_flops()
            return made

        decoder._attended = attended
        try:
            with FlopCounterMode(display=False) as counter:
                decoder.step(torch.tensor(rows), torch.tensor(lengths), cache)
        finally:
            del decoder._attended
        return counter.get_total_flops() - inside["attention"]

    head = rest([5, 5]) - 2 * rest([5])  # nothing, as the last linear is per sequence
    assert rest([200, 4]) == rest([200]) + rest([4]) + head


# --- what a cache keeps --------------------------------------------------------------------------


def test_window_layers_keep_their_window(decoder: Any) -> None:
    cache = decoder.cache(2, 500)
    rooms = {tuple(layer.shape[1:3]) for layer in cache._layers}
    assert rooms == {(2, WINDOW), (2, 500)}
    tokens = LAYERS // 2 * (WINDOW + 500)
    assert (
        cache.nbytes == 2 * 2 * tokens * 2 * 14 * 4
    )  # k and v, sequences, groups, channels, bytes


@pytest.mark.parametrize("cut", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 40])
def test_any_cut_gives_the_same_logits(decoder: Any, cut: int) -> None:
    """Sequences of unequal lengths, read in pieces of any size, as if each were read alone."""
    prompts = [ids(61, 2), ids(7, 3), ids(33, 4)]
    cache = decoder.cache(3, 70)
    logits = None
    for start in range(0, 61, cut):
        parts = [prompt[start : start + cut] for prompt in prompts]
        counts = torch.tensor([len(part) for part in parts])
        rows = torch.tensor([part + [0] * (max(map(len, parts)) - len(part)) for part in parts])
        made = decoder.step(rows, counts, cache)
        logits = made if logits is None else torch.where(counts[:, None] > 0, made, logits)
    for row, prompt in zip(logits, prompts, strict=True):
        alone = decoder.step(
            torch.tensor([prompt]), torch.tensor([len(prompt)]), decoder.cache(1, 70)
        )
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-4)


def test_what_the_next_prompt_shares_is_not_read_again(decoder: Any, hf: Any) -> None:
    engine, prompt = engine_of(decoder), ids(50, 5)
    (first,), timing = engine.generate([prompt], new_tokens=20)
    assert timing.prompt_tokens == 50
    longer = [*prompt, *first.ids, *ids(3, 6)]
    (second,), timing = engine.generate([longer], new_tokens=20)
    assert timing.prompt_tokens == 1 + 3  # the answer's last token had not been read
    assert second.ids == expected(hf, longer, 20)
    other = [*longer, *ids(30, 7)]  # goes on from the prompt, and not with the answer
    (third,), timing = engine.generate([other], new_tokens=20)
    assert timing.prompt_tokens == 30
    assert third.ids == expected(hf, other, 20)
    (fourth,), timing = engine.generate([ids(12, 8)], new_tokens=20)
    assert timing.prompt_tokens == 12
    assert fourth.ids == expected(hf, ids(12, 8), 20)


# --- when it ends --------------------------------------------------------------------------------


def test_several_stop_ids_each_sequence_by_itself(decoder: Any, hf: Any) -> None:
    prompts = [ids(30, 9), ids(5, 10), ids(17, 11)]
    whole = [expected(hf, prompt, 24) for prompt in prompts]
    stops = (whole[0][5], whole[1][11])
    done, _ = engine_of(decoder, stops=stops).generate(prompts, new_tokens=24)
    for one, answer in zip(done, whole, strict=True):
        end = next((i + 1 for i, token in enumerate(answer) if token in stops), 24)
        assert one.ids == answer[:end]
        assert one.reason == ("stop" if answer[end - 1] in stops else "length")


def test_the_model_takes_no_more(decoder: Any) -> None:
    engine = engine_of(decoder, longest=40)
    (one,), _ = engine.generate([ids(35)], new_tokens=20)
    assert (len(one.ids), one.reason) == (5, "context")
    (full,), _ = engine.generate([ids(40)], new_tokens=20)
    assert (full.ids, full.reason) == ([], "context")
    with pytest.raises(UsageError, match="prompt 2 has 41 tokens, and the model takes 40 at most"):
        engine.generate([ids(3), ids(41)], new_tokens=1)
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.generate([[]], new_tokens=1)


def test_long_prompts_are_read_in_parts(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_plugins.infer import engine

    prompts = [ids(90, 12), ids(20, 13), ids(64, 14)]
    whole, _ = engine_of(decoder).generate(prompts, new_tokens=10)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 3 * 32)
    made, _ = engine_of(decoder).generate(prompts, new_tokens=10)
    assert [one.ids for one in made] == [one.ids for one in whole]


# --- how tokens are drawn ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "warpers"),
    [
        (Sampling(0.7), {"temperature": 0.7}),
        (Sampling(1.3, top_k=5), {"temperature": 1.3, "top_k": 5}),
        (Sampling(1.0, top_p=0.6), {"temperature": 1.0, "top_p": 0.6}),
        (Sampling(2.0, top_k=20, top_p=0.9), {"temperature": 2.0, "top_k": 20, "top_p": 0.9}),
    ],
)
def test_probabilities_are_transformers(how: Sampling, warpers: dict[str, float]) -> None:
    from transformers.generation import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
    }
    logits = 3 * torch.randn(4, 200, generator=torch.Generator().manual_seed(3))
    process = LogitsProcessorList([kinds[name](value) for name, value in warpers.items()])
    wanted = process(torch.zeros(4, 1, dtype=torch.int64), logits).softmax(-1)
    torch.testing.assert_close(probabilities(logits, how), wanted)


def test_draws_do_not_depend_on_the_others() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(4))
    together = [Sampler(Sampling(1.0, seed=5), 3).choose(logits).tolist() for _ in range(2)]
    assert together[0] == together[1]
    assert Sampler(Sampling(1.0, seed=5), 1).choose(logits[:1]).tolist() == together[0][:1]


# --- where a text ends ---------------------------------------------------------------------------


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_texts_that_end_it(text: str, stops: list[str]) -> None:
    """What is shown is the text up to where the first stop begins, and never takes anything back."""
    answer = Answer(stops)
    shown, read = "", ""
    for character in text:
        shown += answer.push(character)
        read += character
        assert read.startswith(shown)
        if answer.has_ended:
            break
    shown += answer.finish()
    assert shown == answer.text
    ends = [read.index(stop) for stop in stops if stop in read]
    assert answer.has_ended == bool(ends)
    assert shown == read[: min(ends)] if ends else shown == text
