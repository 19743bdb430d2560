"""Published data sets whose records are in neither form, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gptoss_plugins.data.sft.records import BadRecordError, text_under

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Adapted(NamedTuple):
    """A record in both forms.

    Attributes:
        prompt, completion: as text.
        messages: as a chat.

    """

    prompt: str
    completion: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Preset:
    """A data set at the Hugging Face hub.

    Attributes:
        repository: its name there.
        split: the one to train on.
        validation: the one to validate on; None for a part of the other.
        adapt: a record of it -> both forms.

    """

    repository: str
    split: str
    validation: str | None
    adapt: Callable[[Mapping[str, Any]], Adapted]


def _squad(record: Mapping[str, Any]) -> Adapted:
    """A question about a paragraph, and the first of its answers."""
    context, question = (text_under(key, record) for key in ("context", "question"))
    try:
        answer = record["answers"]["text"][0]
    except (KeyError, IndexError, TypeError):
        answer = None
    if not isinstance(answer, str) or not answer:
        raise BadRecordError("has no answer under answers.text[0]")
    prompt = f"Context: {context} Question: {question} Answer:"
    return Adapted(prompt, f" {answer}", _chat(prompt, answer))


def _openmathinstruct2_thinking(record: Mapping[str, Any]) -> Adapted:
    """The way of a solution up to its boxed result is thinking; ``#### result`` is the answer."""
    problem, solution, result = (
        text_under(key, record) for key in ("problem", "generated_solution", "expected_answer")
    )
    thinking, boxed, _ = solution.rpartition(r"\boxed{")
    thinking = (thinking.rstrip("$ \n") if boxed else solution).strip()
    messages = _chat(problem, f"#### {result}")
    if thinking:
        messages[-1]["thinking"] = thinking
    return Adapted(f"Problem: {problem} Solution:", f" {thinking}\n#### {result}", messages)


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PRESETS = {
    "squad": Preset("rajpurkar/squad", "train", "validation", _squad),
    "openmathinstruct2_thinking": Preset(
        "nvidia/OpenMathInstruct-2", "train_1M", None, _openmathinstruct2_thinking
    ),
}
