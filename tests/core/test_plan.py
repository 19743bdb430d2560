"""Planning: everything that does not fit is found at once, and no guess is made."""

import json

import pytest

from gptoss_convert import Codec, Copy, Drop, ModelFamily, PadVocab, Rule, TensorSpec
from gptoss_convert.errors import PlanError
from gptoss_convert.plan import make_plan

CONFIG = {"layers": 2, "hidden": 3, "vocab": 7}


def rules(config):
    hidden, vocab = config["hidden"], config["vocab"]
    yield Rule({"embed": (vocab, hidden)}, "embedding", PadVocab(vocab))
    yield Rule(
        {"layer.{L}.norm": (hidden,)}, "decoder.layers.{L}.norm", also=("decoder.layers.{L}.n2",)
    )
    yield Rule({"layer.{L}.inv_freq": (hidden,)}, "", Drop("made from the config"))
    yield Rule({"head": (vocab, hidden)}, "output", Copy())


FAMILY = ModelFamily(
    "toy", frozenset({"Toy"}), rules, lambda c: {"num_layers": c["layers"]}, lambda m: {}
)
HF = {
    "embed": (7, 3),
    "layer.0.norm": (3,),
    "layer.1.norm": (3,),
    "layer.1.inv_freq": (3,),
    "head": (7, 3),
}
CODEC = Codec(
    "half",
    ("_a", "_b"),
    lambda config: False,
    lambda parts: TensorSpec(parts[0].shape, "BF16"),
    lambda parts, out=None: parts[0],
)


def specs(dtype="BF16", **changes):
    shapes = {**HF, **changes}
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items() if shape is not None}


def plan(found, direction="import", **options):
    return make_plan(direction, found, FAMILY, CONFIG, where="here", **options)


def problems(found, direction="import", **options) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan(found, direction, **options)
    assert str(caught.value).startswith("here: ")
    return caught.value.problems


def test_steps_in_order_with_totals() -> None:
    made = plan(specs())
    assert [s.inputs[0].name for s in made.steps] == [
        "embed",
        "layer.0.norm",
        "layer.1.norm",
        "head",
    ]
    assert [s.layer for s in made.steps] == [None, 0, 1, None]
    assert made.parameters == 21 + 3 + 3 + 21
    assert made.bytes_in == made.bytes_out == 2 * made.parameters
    assert made.dropped == (("layer.1.inv_freq", "made from the config"),)
    assert made.steps[1].outputs[0].also == ("decoder.layers.0.n2",)
    assert json.loads(json.dumps(made.to_json())) == made.to_json()


def test_every_misfit_is_named_at_once() -> None:
    found = specs(embed=(8, 3), head=None, stray=(1,))
    found["layer.1.norm"] = TensorSpec((3,), "F32")
    text = problems(found)
    assert [t.split(":")[0] for t in text] == ["embed", "head", "layer.1.norm", "stray"]
    assert "[8, 3] where the config asks for [7, 3]" in text[0]
    assert "is missing" in text[1]
    assert "is F32 where the rest of the checkpoint is BF16" in text[2]
    assert "no rule maps it" in text[3]
    assert all(";" in t for t in text), "each says what to do"


def test_a_renamed_tensor_is_recognised() -> None:
    text = problems({n.replace("1.norm", "1.norms"): s for n, s in specs().items()})
    assert "layer.1.norm: is missing; the checkpoint has layer.1.norms in its place" in text[0]


def test_at_most_twenty_are_shown_and_all_are_kept() -> None:
    with pytest.raises(PlanError) as caught:
        plan({**specs(), **{f"x{i:02}": TensorSpec((1,), "BF16") for i in range(31)}})
    assert len(caught.value.problems) == 31
    shown = str(caught.value).splitlines()
    assert shown[0] == "here: 31 problems"
    assert len(shown) == 22
    assert shown[-1].strip() == "... and 11 more"


def test_export_takes_any_name_of_a_tensor_and_cuts_padding() -> None:
    found = {
        "embedding": TensorSpec((16, 3), "BF16"),  # padded for tensor parallelism
        "decoder.layers.0.norm": TensorSpec((3,), "BF16"),
        "decoder.layers.0.n2": TensorSpec((3,), "BF16"),
        "decoder.layers.1.n2": TensorSpec((3,), "BF16"),
        "output": TensorSpec((7, 3), "BF16"),
    }
    made = plan(found, "export")
    assert made.steps[0].inputs[0].spec.shape == (7, 3)
    assert [i.name for i in made.steps[1].inputs] == [
        "decoder.layers.0.norm",
        "decoder.layers.0.n2",
    ]
    assert [i.name for i in made.steps[2].inputs] == ["decoder.layers.1.n2"]
    assert made.parameters == 48


def test_a_vocabulary_that_is_too_short_is_no_padding() -> None:
    found = {n: TensorSpec(s, "BF16") for n, s in [("embedding", (6, 3)), ("output", (7, 3))]}
    found |= {f"decoder.layers.{n}.norm": TensorSpec((3,), "BF16") for n in (0, 1)}
    assert "shape [6, 3]" in problems(found, "export")[0]


def test_quantized_parts_fold_only_if_declared() -> None:
    found = specs(head=None, head_a=(7, 3), head_b=(7,))
    undeclared = problems(found, known_codecs=[CODEC])
    assert any("--codec half" in t for t in undeclared)
    made = plan(found, codec=CODEC)
    assert [n for n, _ in made.steps[-1].inputs[0].parts] == ["head_a", "head_b"]
    assert made.codecs == ("half",)


def test_a_declared_codec_must_be_there() -> None:
    assert "to be half, but no tensor ends in _a or _b" in problems(specs(), codec=CODEC)[0]


def test_half_of_a_quantized_tensor_is_reported_once() -> None:
    text = problems(specs(head=None, head_a=(7, 3)), codec=CODEC)
    assert text == (
        "head_b: is missing; the checkpoint is incomplete, or its config describes another model",
    )


def test_mixed_floats_are_refused_on_import_and_cast_on_export() -> None:
    found = {n: TensorSpec(s, "BF16") for n, s in [("embedding", (7, 3)), ("output", (7, 3))]}
    found |= {f"decoder.layers.{n}.norm": TensorSpec((3,), "F32") for n in (0, 1)}
    assert plan(found, "export").dtype == "F32", "loses nothing"
    made = plan(found, "export", dtype="BF16")
    assert made.casts == (("F32", "BF16"),)
    found["decoder.layers.1.norm"] = TensorSpec((3,), "I64")
    assert "is I64" in problems(found, "export")[0]


def test_digest_follows_what_decides_the_bytes() -> None:
    assert plan(specs()).digest() == plan(specs()).digest()
    assert plan(specs()).digest() != plan(specs(), dtype="F32").digest()


def test_digest_is_the_same_in_every_process_for_an_op_without_a_repr() -> None:
    class Mine(Copy):
        __repr__ = object.__repr__

    table = [Rule({"head": (7, 3)}, "output", Mine())]
    family = ModelFamily("t", frozenset(), lambda c: table, lambda c: {"num_layers": 0}, dict)
    found = {"head": TensorSpec((7, 3), "BF16")}
    made = make_plan("import", found, family, CONFIG, where="here")
    assert "0x" not in json.dumps(made.to_json())


def test_two_rules_that_make_one_parameter_are_refused() -> None:
    table = [Rule({"a": (1,)}, "same"), Rule({"b": (1,)}, "other", also=("same",))]
    family = ModelFamily("t", frozenset(), lambda c: table, lambda c: {"num_layers": 0}, dict)
    found = {n: TensorSpec((1,), "BF16") for n in "ab"}
    with pytest.raises(PlanError, match="same: 2 rules make it"):
        make_plan("import", found, family, CONFIG, where="here")
