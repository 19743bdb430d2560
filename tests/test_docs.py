"""The tutorials on plugins and codecs and the hooks' examples are true, and stay so."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import shlex
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
import pytest

import gptoss_convert
from gptoss_convert import TensorSpec, hookspecs, types
from gptoss_convert.cli import main
from gptoss_convert.registry import KINDS, Registry, default_registry
from gptoss_convert.testing import assert_codec

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT / "tests" / "third_party"
MODULE = "gptoss_convert_llama"
PAGE = (ROOT / "docs" / "plugins.md").read_text()
CODECS = (ROOT / "docs" / "codecs.md").read_text()
TEXT, CODECS_TEXT = (
    re.sub(r"^```.*?^```$", "", page.split("## All hooks")[0], flags=re.DOTALL | re.MULTILINE)
    for page in (PAGE, CODECS)
)
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("gptoss_convert_")}
RECORDS = {
    "models": types.ModelFamily,
    "codecs": types.Codec,
    "formats": types.Format,
    "resharders": types.Resharder,
    "validators": types.Validator,
    "recipes": types.Recipe,
}


def fields(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that the page builds, importable by its name."""
    monkeypatch.syspath_prepend(FOREIGN)
    yield __import__(MODULE)
    sys.modules.pop(MODULE, None)


# --- the tutorials -------------------------------------------------------------------------------

pages = pytest.mark.parametrize("page", [PAGE, CODECS], ids=["plugins", "codecs"])


@pytest.mark.parametrize(
    ("page", "module"),
    [(PAGE, FOREIGN / f"{MODULE}.py"), (CODECS, ROOT / "plugins" / "gptoss_plugins" / "mxfp8.py")],
    ids=["plugins", "codecs"],
)
def test_the_blocks_put_together_are_the_module(page: str, module: Path) -> None:
    built = "\n\n\n".join(block.strip("\n") for block in blocks("python", page)) + "\n"
    assert built == module.read_text()


def test_the_page_shows_the_distribution() -> None:
    assert blocks("toml") == [(FOREIGN / "pyproject.toml").read_text()]


@pages
def test_the_session_runs_as_shown(llama: ModuleType, page: str) -> None:
    (session,) = blocks("pycon", page)
    parsed = doctest.DocTestParser().get_doctest(session, {}, "the page", None, None)
    assert len(parsed.examples) >= 8
    told: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(parsed, out=told.append)
    assert result.failed == 0, "".join(told)
    assert result.attempted == len(parsed.examples)


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        (PAGE, {"plugins", "plan", "import", "export", "layers", "quantize"}),
        (CODECS, {"plugins", "import", "export", "quantize", "dequantize"}),
    ],
    ids=["plugins", "codecs"],
)
def test_the_commands_exist_with_their_flags(llama: ModuleType, page: str, shown: set[str]) -> None:
    (console,) = blocks("console", page)
    foreign = {command.name: command for command in llama.gptoss_convert_commands()}
    commands: dict[Any, Any] = {**main.commands, **default_registry().commands(), **foreign}
    tried = set()
    for line in console.splitlines():
        program, name, *words = shlex.split(line.removeprefix("$ "))
        if program != "gptoss-convert":
            continue
        flags = [flag for option in commands[name].params for flag in option.opts]
        assert {word for word in words if word.startswith("-")} <= set(flags), line
        tried.add(name)
    assert tried == shown


@pages
def test_codecs_that_are_named_exist(llama: ModuleType, page: str) -> None:
    ours = set(default_registry().codecs()) | {c.name for c in llama.gptoss_convert_codecs()}
    named = set(re.findall(r"--(?:codec|export-dtype) ([a-z][\w-]*)", page))
    assert named
    assert named <= ours


def test_ops_and_shard_kinds_are_explained() -> None:
    ops = {n for n in gptoss_convert.__all__ if hasattr(getattr(gptoss_convert, n), "forward")}
    assert len(ops) == 7
    kinds = set(types.Shard.__members__) - {"REPLICATED"}  # "not at all"
    assert {name for name in ops | kinds if f"`{name}`" not in TEXT} == set()


@pytest.mark.parametrize("hook", HOOKS)
def test_the_page_names_every_hook_and_what_it_yields(hook: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{hook}` |")]
    record = RECORDS.get(hook.removeprefix("gptoss_convert_"), click.Command)
    wanted = "click.Command" if record is click.Command else record.__name__
    assert f"`{wanted}`" in row
    assert f"Iterable[{wanted}]" in str(inspect.signature(HOOKS[hook]))
    told = re.findall(r"`(\w+)`", row.split("|")[3].split(";")[0])
    assert told == ([] if record is click.Command else fields(record))


def test_hooks_kinds_and_records_are_the_same_list() -> None:
    assert [hook.removeprefix("gptoss_convert_") for hook in HOOKS] == list(KINDS)
    assert {*RECORDS, "commands"} == set(KINDS)


@pytest.mark.parametrize("record", [types.Rule, types.ModelFamily, types.TensorSpec])
def test_the_text_explains_every_field_of_the_records_it_uses(record: type) -> None:
    assert [name for name in fields(record) if f"`{name}`" not in TEXT] == []


def test_the_text_on_codecs_explains_every_field() -> None:
    assert [name for name in fields(types.Codec) if f"`{name}`" not in CODECS_TEXT] == []


def test_findings_are_explained() -> None:
    assert [name for name in fields(types.Finding) if f"`{name}`" not in PAGE] == []


# --- the hooks' own examples ---------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_an_example_works(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a file and loaded as a plugin, it gives the registry a record."""
    _, found, example = inspect.getdoc(HOOKS[hook]).partition("Example::\n")
    assert found
    module = f"example_{hook}"
    known = "from gptoss_convert import *\nimport click\nOneFileSource = OneFileSink = object\n"
    (tmp_path / f"{module}.py").write_text(known + textwrap.dedent(example))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("GPTOSS_CONVERT_PLUGINS", raising=False)
    registry = Registry([EntryPoint("example", module, "gptoss_convert")])
    assert registry.failures == []
    offered = {kind: list(getattr(registry, kind)()) for kind in KINDS}
    assert {kind: len(names) for kind, names in offered.items() if names} == {
        hook.removeprefix("gptoss_convert_"): 1
    }
    for codec in registry.codecs().values():
        assert_codec(codec, TensorSpec((7, 6), "BF16"), signed_zeros=False, any_bytes=())
    sys.modules.pop(module, None)
