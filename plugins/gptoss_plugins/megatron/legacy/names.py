"""Names in per-rank checkpoints: of a rank's folder, of a chunk's state, of a module's tensors.

A tensor's canonical name counts layers through the whole model and holds all experts of a layer;
in a file layers and experts are counted from the rank's first, and what names they have depends on
the modules the model is made of (its dialect).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_convert.layout import EXPERT_AXIS, Layout, Rank

if TYPE_CHECKING:
    from collections.abc import Iterable

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FILE = "model_optim_rng.pt"
# The optimizer's own files, which a distributed optimizer writes beside the model's.
OPTIMIZER_FILES = ("distrib_optim.pt", "layer_wise_optimizer_*.pt")
TE_GROUPED, TE_SEQUENTIAL, LOCAL_SEQUENTIAL, LOCAL_GROUPED = DIALECTS = (
    "te-grouped",
    "te-sequential",
    "local-sequential",
    "local-grouped",
)
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.)?"
    r"(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<grouped>\d*)"
)
# The first norm stands by itself in megatron-core's own modules, and is fused with the linear
# behind it in Transformer Engine's.
_FUSED_NORM, _OWN_NORM = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
GROUPED_GEMM = ("mlp.experts.weight1", "mlp.experts.weight2")


def rank_folder(layout: Layout, rank: Rank) -> str:
    """The folder of a rank; ranks along an axis of size 1 are not counted."""
    pp = f"_{rank.pp:03d}" if layout.pp > 1 else ""
    ep = f"_{rank.ep:03d}" if layout.ep > 1 else ""
    return f"mp_rank_{rank.tp:02d}{pp}{ep}"


def rank_numbers(folder: str) -> tuple[int, ...] | None:
    """The numbers in a rank folder's name, tensor parallel first; None if it is no such name."""
    found = _RANK.fullmatch(folder)
    return tuple(int(n) for n in found.groups() if n is not None) if found else None


def chunk_key(layout: Layout, number: int) -> str:
    """Under which key of a file the state of a stage's chunk is."""
    return f"model{number}" if layout.vpp > 1 else "model"


def stored_names(canonical: str, local: int | None, dialect: str, experts: int) -> list[str]:
    """The names of a parameter's tensors in a file: one, or one per expert of the rank.

    Args:
        canonical: the parameter's name.
        local: its layer's number in the chunk; None outside the layers.
        dialect: one of DIALECTS.
        experts: how many the rank has.

    """
    layer = _LAYER.fullmatch(canonical)
    lead, rest = (f"decoder.layers.{local}.", layer[2]) if layer else ("", canonical)
    if rest == _FUSED_NORM and not dialect.startswith("te-"):
        rest = _OWN_NORM
    if not rest.endswith(EXPERT_AXIS):
        return [lead + rest]
    rest = rest.removesuffix(EXPERT_AXIS)
    if dialect == LOCAL_GROUPED:
        return [lead + rest]
    if dialect == TE_GROUPED:
        return [f"{lead}{rest}{expert}" for expert in range(experts)]
    module, linear = rest.split(".experts.", 1)
    return [f"{lead}{module}.experts.local_experts.{expert}.{linear}" for expert in range(experts)]


def extra_states(names: Iterable[str], dialect: str) -> list[str]:
    """The ``_extra_state`` entries that modules with these tensors have.

    megatron-core's linear layers keep an empty one for Transformer Engine's sake, whose linear
    layers, norms and attention have one each.
    """
    found: dict[str, None] = {}
    for name in names:
        module, _, _ = name.rpartition(".")
        kind = module.rpartition(".")[2]
        linear = kind.startswith("linear_") or kind == "output_layer"
        if dialect == LOCAL_GROUPED and ".experts." in module:
            continue
        other = kind.endswith("layernorm") or kind == "core_attention"
        if linear or (other and dialect.startswith("te-")):
            found[f"{module}._extra_state"] = None
    return list(found)


@dataclass(frozen=True)
class Stored:
    """What a name in a file stands for.

    Attributes:
        name: the canonical name, its layer counted from the chunk's first.
        layer: that layer; None outside the layers.
        expert: which of the rank's experts it is; None if it has all of them, or is of none.
        fused: whether it shows the first norm to be fused with a linear, or not; None if neither.

    """

    name: str
    layer: int | None
    expert: int | None = None
    fused: bool | None = None

    def at(self, first: int) -> str:
        """The canonical name in a model whose chunk begins with layer ``first``."""
        layer = _LAYER.fullmatch(self.name)
        return f"decoder.layers.{first + int(layer[1])}.{layer[2]}" if layer else self.name


def stored(name: str) -> Stored | None:
    """Read a name in a file, of any dialect; None for state of a module that is no weight."""
    while name.startswith("module."):  # as wrappers of the model leave it
        name = name.removeprefix("module.")
    if name.rpartition(".")[2].startswith("_extra_state"):
        return None
    found = _LAYER.fullmatch(name)
    if found is None:
        return Stored(name, None)
    lead, layer, rest = f"decoder.layers.{found[1]}.", int(found[1]), found[2]
    if rest in (_FUSED_NORM, _OWN_NORM):
        return Stored(lead + _FUSED_NORM, layer, fused=rest == _FUSED_NORM)
    if expert := _EXPERT.fullmatch(rest):
        whole = f"{lead}mlp.experts.{expert['linear']}.{expert['kind']}{EXPERT_AXIS}"
        number = expert["one"] if expert["one"] is not None else expert["grouped"]
        return Stored(whole, layer, int(number) if number else None)
    return Stored(name, layer)


def dialect_of(names: Iterable[str]) -> str:
    """Which dialect a chunk's names are of; "mixed" or "unknown" where they do not say."""
    fused, kinds = set(), set()
    for name in names:
        if (found := stored(name)) is None:
            continue
        if found.fused is not None:
            fused.add("te" if found.fused else "local")
        if found.name.endswith(EXPERT_AXIS):
            grouped = found.expert is None or ".local_experts." not in name
            kinds.add("grouped" if grouped else "sequential")
    if not fused or not kinds:
        return "unknown"
    return f"{fused.pop()}-{kinds.pop()}" if len(fused) == len(kinds) == 1 else "mixed"
