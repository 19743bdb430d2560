"""What is shipped, what an install makes importable, and which room may import which."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest

from gptoss_convert import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = {"gptoss_convert", "gptoss_plugins", "gptoss_kernels"}
SHELVES = ("plugins", "kernels", "tests")  # folders of the repository that are no packages
HEAVY = {"torch", "triton", "transformers", "megatron", "numpy"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str, *flags: str, cwd: Path) -> str:
    """What a fresh interpreter prints, with no folder of ours on its path by accident."""
    command = [sys.executable, "-P", *flags, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def sources(folder: Path) -> set[str]:
    return {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}


@pytest.mark.parametrize("shelf", ["plugins", "kernels"])
def test_a_shelf_holds_one_package_and_no_module(shelf: str) -> None:
    assert list((ROOT / shelf).glob("*.py")) == []
    packages = [path.parent.name for path in (ROOT / shelf).glob("*/__init__.py")]
    assert packages == [f"gptoss_{shelf}"]


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


# --- the wheel -----------------------------------------------------------------------------------


def test_the_wheel_holds_the_three_packages_whole(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    info = f"gptoss_convert-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == PACKAGES | {info}
    folders = (ROOT / "gptoss_convert", *(ROOT / s / f"gptoss_{s}" for s in ("plugins", "kernels")))
    assert {name for name in names if name.endswith(".py")} == set().union(*map(sources, folders))


def test_the_wheel_states_entry_points_and_version(wheel: Path) -> None:
    archive, info = ZipFile(wheel), f"gptoss_convert-{__version__}.dist-info"
    lines = archive.read(f"{info}/entry_points.txt").decode().splitlines()
    assert "gptoss-convert = gptoss_convert.cli:main" in lines
    start = lines.index("[gptoss_convert]") + 1
    declared = dict(line.split(" = ") for line in lines[start:] if " = " in line)
    assert declared == PROJECT["entry-points"]["gptoss_convert"]
    assert f"\nVersion: {__version__}\n" in archive.read(f"{info}/METADATA").decode()


def test_the_wheel_puts_no_shelf_on_the_path(wheel: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, importlib.util as u; sys.path.insert(0, {str(wheel)!r}); "
        f"print([n for n in {[*sorted(PACKAGES), *SHELVES]} if u.find_spec(n)])"
    )
    assert python(code, "-S", "-E", cwd=tmp_path) == str(sorted(PACKAGES))


def test_an_editable_install_maps_the_packages_and_nothing_else(tmp_path: Path) -> None:
    build = "from hatchling.build import build_editable; import sys; build_editable(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (editable,) = tmp_path.glob("*.whl")
    archive = ZipFile(editable)
    for name in archive.namelist():
        if name.endswith(".pth"):  # a line that is no import would be a folder for sys.path
            lines = archive.read(name).decode().splitlines()
            assert [line for line in lines if not line.startswith("import ")] == []
    modules = [name for name in archive.namelist() if name.endswith(".py")]
    mapped = "".join(archive.read(name).decode() for name in modules)
    assert {package for package in PACKAGES if f"'{package}'" in mapped} == PACKAGES
    assert mapped.count("F.map_module(") == len(PACKAGES)


# --- the installation that runs these tests ------------------------------------------------------


def test_the_install_makes_no_shelf_importable(tmp_path: Path) -> None:
    """``kernels`` is a package of Hugging Face's, which transformers asks for by that name."""
    code = (
        "import importlib.util as u, json; "
        f"found = [(n, u.find_spec(n)) for n in {[*sorted(PACKAGES), *SHELVES]}]; "
        "places = {n: [s.origin, *(s.submodule_search_locations or [])] for n, s in found if s}; "
        "print(json.dumps(places))"
    )
    places = json.loads(python(code, cwd=tmp_path))
    assert places.keys() >= PACKAGES
    for shelf in SHELVES:  # another distribution may well provide one
        ours = [p for p in places.get(shelf, []) if p and Path(p).is_relative_to(ROOT / shelf)]
        assert ours == []


def installed() -> dict[str, EntryPoint]:
    points = entry_points(group="gptoss_convert")
    return {p.name: p for p in points if p.dist and p.dist.name == PROJECT["name"]}


def test_entry_points_are_installed() -> None:
    declared = PROJECT["entry-points"]["gptoss_convert"]
    assert {name: point.value for name, point in installed().items()} == declared


@pytest.mark.parametrize("name", sorted(PROJECT["entry-points"]["gptoss_convert"]))
def test_a_plugin_loads_and_offers_something(name: str) -> None:
    module = installed()[name].load()
    hooks = [key for key in vars(module) if key.startswith("gptoss_convert_")]
    assert hooks
    assert all(hasattr(getattr(module, hook), "gptoss_convert_impl") for hook in hooks)


@pytest.mark.parametrize("words", [["--help"], ["import", "--help"], ["plugins"], ["--version"]])
def test_light_commands_import_nothing_heavy(tmp_path: Path, words: list[str]) -> None:
    code = (
        "import sys\n"
        "from gptoss_convert.cli import main\n"
        f"sys.argv = ['gptoss-convert', *{words}]\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        f"print('ended with', code, sorted({HEAVY} & sys.modules.keys()))\n"
    )
    assert python(code, cwd=tmp_path).splitlines()[-1] == "ended with 0 []"


# --- who imports whom ----------------------------------------------------------------------------


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """``lint-imports`` on a source tree, wherever the packages are installed from."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirect' not in str(f)]\n"
        f"sys.path[:0] = [str({str(root)!r} + '/' + p) for p in ('', 'plugins', 'kernels')]\n"
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_core_and_kernels_import_neither_plugins_nor_each_other() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("gptoss_convert/ops.py", "import gptoss_kernels"),
        ("gptoss_convert/fit.py", "from gptoss_plugins import gptoss"),
        ("kernels/gptoss_kernels/mxfp4.py", "import gptoss_convert"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    for name in ("gptoss_convert", "plugins", "kernels"):
        copytree(ROOT / name, tmp_path / name, ignore=ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with (tmp_path / module).open("a") as file:
        file.write(f"\n\ndef _late() -> None:\n    {line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 broken" in done.stdout
