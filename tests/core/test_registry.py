"""Plugins load one by one, and nothing is ever chosen in silence."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from gptoss_convert import Codec, ModelFamily, TensorSpec, hookimpl
from gptoss_convert.errors import PluginError
from gptoss_convert.registry import SWITCH, Registry


def family(name: str, *architectures: str) -> ModelFamily:
    return ModelFamily(name, frozenset(architectures), lambda c: [], lambda c: {}, lambda m: {})


def codec(name: str) -> Codec:
    def declared(config):
        return config["quantization_config"]["quant_method"] == "q"

    return Codec(
        name, ("_q",), declared, lambda p: TensorSpec((), "BF16"), lambda p, out=None: p[0]
    )


@pytest.fixture
def install(monkeypatch):
    """Make importable modules with hooks; returns entry points to them."""

    def make(**plugins) -> list[EntryPoint]:
        points = []
        for name, hooks in plugins.items():
            module = ModuleType(f"plugin_{name}")
            for hook, records in hooks.items():
                implementation = lambda records=records: records() if callable(records) else records
                implementation.__name__ = hook
                setattr(module, hook, hookimpl(_no_arguments(implementation)))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            points.append(EntryPoint(name, module.__name__, "gptoss_convert"))
        return points

    return make


def _no_arguments(function):
    """pluggy reads signatures: a hook here takes nothing."""

    def hook():
        return function()

    return hook


def test_models_are_chosen_by_architecture(install) -> None:
    points = install(
        a={"gptoss_convert_models": [family("one", "A")]},
        b={"gptoss_convert_models": [family("two", "B")]},
    )
    registry = Registry(points)
    assert registry.model_for({"architectures": ["B"]}).name == "two"
    assert registry.model_for({"architectures": ["B"]}, "one").name == "one"
    with pytest.raises(PluginError, match="no installed plugin knows the architecture C"):
        registry.model_for({"architectures": ["C"]})
    with pytest.raises(PluginError, match="--model three: there is none; there are one or two"):
        registry.model_for({}, "three")


def test_two_that_match_are_an_error_that_names_both(install) -> None:
    points = install(
        a={"gptoss_convert_models": [family("one", "A")]},
        b={"gptoss_convert_models": [family("two", "A")]},
    )
    with pytest.raises(PluginError, match=r"'a' of .* and plugin 'b' of .*--model one or two"):
        Registry(points).model_for({"architectures": ["A"]})


def test_two_of_one_name_are_an_error(install) -> None:
    points = install(
        a={"gptoss_convert_codecs": [codec("same")]}, b={"gptoss_convert_codecs": [codec("same")]}
    )
    with pytest.raises(PluginError, match="both offer 'same'"):
        Registry(points).codecs()
    assert list(Registry(points, disabled=["b"]).codecs()) == ["same"]


def test_codec_only_if_declared(install) -> None:
    registry = Registry(install(a={"gptoss_convert_codecs": [codec("q")]}))
    assert registry.codec_for({}) is None
    assert registry.codec_for({"quantization_config": None}) is None
    assert registry.codec_for({"quantization_config": {"quant_method": "q"}}).name == "q"
    with pytest.raises(PluginError, match="the quantization 'other'"):
        registry.codec_for({"quantization_config": {"quant_method": "other"}})


def test_a_broken_plugin_takes_nobody_down(install) -> None:
    points = install(good={"gptoss_convert_models": [family("one", "A")]})
    registry = Registry(
        [*points, EntryPoint("broken", "no_such_module_anywhere", "gptoss_convert")]
    )
    assert list(registry.models()) == ["one"]
    (failure,) = registry.failures
    assert failure.name == "broken"
    assert "no_such_module_anywhere" in failure.error


def test_a_misspelt_hook_is_an_error_that_names_the_right_one(install) -> None:
    registry = Registry(install(a={"gptoss_convert_model": []}))
    with pytest.raises(PluginError, match="did you mean gptoss_convert_models"):
        registry.models()


def test_a_plugin_that_fails_or_yields_something_else_is_named(install) -> None:
    def fail():
        raise RuntimeError("boom")

    with pytest.raises(PluginError, match=r"plugin 'a' failed in gptoss_convert_models.*boom"):
        Registry(install(a={"gptoss_convert_models": fail})).models()
    with pytest.raises(
        PluginError, match="yields str from gptoss_convert_codecs, which takes Codec"
    ):
        Registry(install(a={"gptoss_convert_codecs": ["x"]})).codecs()


def test_switching_plugins_off(install, monkeypatch) -> None:
    points = install(
        a={"gptoss_convert_models": [family("one", "A")]},
        b={"gptoss_convert_models": [family("two", "B")]},
    )
    monkeypatch.setenv(SWITCH, "b")
    assert list(Registry(points).models()) == ["two"]
    monkeypatch.setenv(SWITCH, "")
    assert Registry(points).models() == {}


def test_the_project_registers_like_anyone() -> None:
    registry = Registry()
    assert {"gpt-oss"} <= registry.models().keys()
    assert {"mxfp4"} <= registry.codecs().keys()
    assert {"huggingface", "torch_dist"} <= registry.formats().keys()
    assert {p.distribution for p in registry.plugins} >= {"gptoss-convert"}
    assert registry.failures == []
