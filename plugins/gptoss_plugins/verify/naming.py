"""What is wrong with a checkpoint's headers or config, as findings that name the state it is in."""

from __future__ import annotations

import re

from gptoss_convert.types import Finding
from gptoss_plugins.huggingface.headers import INDEX
from gptoss_plugins.verify.configs import WINDOW, YARN

_SHAPES = re.compile(
    r"(?P<name>[\w.{}]+)(?:: has| in) shape \[(?P<found>[\d, ]+)\] where the config "
    r"(?:asks for|and the layout \(.*\) make it) \[(?P<wanted>[\d, ]+)\]"
)
_PROJECTIONS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}  # in Megatron's names
_GHOST = (f"where {INDEX} places it", f"is named in {INDEX} but is not there")
_ABOUT = {  # words of a sentence about a config -> the state of a config without what it is about
    re.compile(r"YaRN|RoPE|\brope|yarn_|rotary_"): YARN,
    re.compile(r"sliding_window|window_|layer_types is"): WINDOW,
}
_MAKE_AGAIN = "make the checkpoint again, or fetch it again"


def problem(path: str, text: str) -> Finding:
    """A sentence ``<what>: <is wrong>; <remedy>`` as a finding."""
    what, _, remedy = text.partition("; ")
    if any(words in text for words in _GHOST):
        what = f"ghost index keys: {what}"
    found = _SHAPES.search(what)
    if found and _are_transposed(found["found"], found["wanted"]):
        what = f"transposed {_projection(found['name'])}: {what}"
    return Finding("error", path, what, remedy or _MAKE_AGAIN)


def broken(path: str, text: str) -> Finding:
    """An error that left nothing to look into as a finding."""
    what, _, remedy = text.removeprefix(f"{path}: ").rpartition("; ")
    if not what:
        what, remedy = remedy, _MAKE_AGAIN
    states = [state for words, state in _ABOUT.items() if "onfig" in what and words.search(what)]
    return Finding("error", path, ": ".join([*states, what]), remedy)


def _projection(name: str) -> str:
    """What Hugging Face calls it."""
    for part in name.split("."):
        if part in _PROJECTIONS:
            return _PROJECTIONS[part]
    return name.rsplit(".", 1)[-1]


def _are_transposed(one: str, two: str) -> bool:
    """Whether two shapes, as they are printed, have their last two sizes swapped."""
    first, second = (shape.split(", ") for shape in (one, two))
    return len(first) > 1 and first[-2:] == second[:-3:-1] and first != second
