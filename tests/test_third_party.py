"""A foreign distribution, installed from its wheel beside ours, found and used from the outside.

Heavy dependencies come from the running interpreter's site-packages, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import TensorSpec
from gptoss_convert.errors import ConfigError, EncodeError
from gptoss_convert.testing import assert_codec, assert_roundtrip

TESTS = Path(__file__).parent
FOREIGN = TESTS / "third_party"
SWITCHES = ("GPTOSS_CONVERT_PLUGINS", "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")

# No two sizes alike, and more query channels (6 x 10) than hidden ones.
LAYERS, H, I, HEADS, GROUPS, D, V = 3, 48, 56, 6, 2, 10, 70
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": H,
    "intermediate_size": I,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": D,
    "vocab_size": V,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
UNQUANTIZED = ["model.embed_tokens", "lm_head"]
TOKENIZER = b'{"model": "none"}\n'


# --- the environment -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """A fresh virtual environment with both wheels in it."""

    root: Path

    @property
    def packages(self) -> Path:
        """Its own site-packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def run(
        self, *words: str | Path, more: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """``gptoss-convert WORDS``; ``more`` is a folder of further installed distributions."""
        return self.execute("gptoss-convert", *words, more=more, **variables)

    def execute(
        self, program: str, *words: str | Path, more: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A program of the environment; its variables are ours without those that matter here."""
        env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
        env |= variables | ({"PYTHONPATH": str(more)} if more else {})
        return subprocess.run(
            [self.root / "bin" / program, *words],
            env=env,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def convert(self, *words: str | Path) -> str:
        """The command's output; it must succeed and find nothing to say on stderr."""
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("third_party")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    wheels = [*offline, "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *wheels, str(TESTS.parent), str(FOREIGN)], check=True)
    place = Installed(folder / "venv")
    venv.create(place.root, with_pip=False, symlinks=True)
    into = [*pip, "--python", str(place.root / "bin" / "python"), "install", *offline]
    subprocess.run([*into, *map(str, folder.glob("*.whl"))], check=True)
    heavy = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (place.packages / "heavy.pth").write_text("".join(f"{path}\n" for path in sorted(heavy)))
    return place


def distribution(folder: Path, name: str, code: str, point: str | None = None) -> Path:
    """What ``pip install --target`` leaves of a distribution with one module: a further plugin."""
    module = name.replace("-", "_")
    info = folder / f"{module}-4.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 4.2\n")
    (info / "entry_points.txt").write_text(f"[gptoss_convert]\n{point or module} = {module}\n")
    (folder / f"{module}.py").write_text(code)
    return folder


@pytest.fixture(scope="session")
def plugin() -> Any:
    """The foreign module itself, for what is cheaper to see from the inside."""
    spec = importlib.util.spec_from_file_location("llama", FOREIGN / "gptoss_convert_llama.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_comes_from_the_wheels(installed: Installed) -> None:
    ours = ("gptoss_convert", "gptoss_plugins", "gptoss_kernels", "gptoss_convert_llama")
    names = (*ours, "click")
    code = f"import importlib as i; [print(i.import_module(n).__file__) for n in {names}]"
    files = installed.execute("python", "-c", code).stdout.split()
    assert len(files) == len(names)
    for file in files[: len(ours)]:
        assert Path(file).is_relative_to(installed.packages)
    assert not Path(files[-1]).is_relative_to(installed.root)


# --- found ---------------------------------------------------------------------------------------


def test_plugins_lists_it_with_its_distribution(installed: Installed) -> None:
    found = json.loads(installed.convert("plugins", "--json"))
    names = [plugin["name"] for plugin in found["plugins"]]
    assert len(set(names)) == len(names)
    assert {plugin["distribution"] for plugin in found["plugins"] if plugin["name"] != "llama"} == {
        "gptoss-convert"
    }
    assert found["plugins"][names.index("llama")] == {
        "name": "llama",
        "distribution": "gptoss-convert-llama",
        "version": "0.2.0",
        "module": "gptoss_convert_llama",
        "error": "",
    }
    offers = found["offers"]
    assert {"llama", "gpt-oss"} <= set(offers["models"])
    assert {"int8-rowwise", "mxfp4"} <= set(offers["codecs"])
    assert "layers" in offers["commands"]


def test_its_command_is_in_the_help(installed: Installed) -> None:
    listed = installed.convert("--help")
    assert re.search(r"^  layers +Print how many parameters each layer", listed, re.MULTILINE)
    assert "--hf-model" in installed.convert("layers", "--help")


def test_its_command_counts_by_layer(installed: Installed, hf: Path) -> None:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    told = dict(
        line.rsplit(maxsplit=1)
        for line in installed.convert("layers", "--hf-model", hf).splitlines()
    )
    rest = sum(sizes.values()) - LAYERS * layer
    assert told == {"outside": f"{rest:,}", **{f"layer {n}": f"{layer:,}" for n in range(LAYERS)}}


def test_the_environment_variable_limits_what_is_loaded(installed: Installed) -> None:
    def offers(value: str) -> dict[str, list[str]]:
        done = installed.run("plugins", "--json", GPTOSS_CONVERT_PLUGINS=value)
        assert (done.returncode, done.stderr) == (0, "")
        return {k: v for k, v in json.loads(done.stdout)["offers"].items() if v}

    assert offers("") == {}
    assert offers("llama") == {
        "models": ["llama"],
        "codecs": ["int8-rowwise"],
        "commands": ["layers"],
    }
    assert offers("llama,gptoss")["models"] == ["gpt-oss", "llama"]


def test_no_plugin_leaves_one_out(installed: Installed, hf: Path) -> None:
    unknown = installed.run("--no-plugin", "llama", "layers")
    assert unknown.returncode == 2
    assert "No such command 'layers'" in unknown.stderr
    done = installed.run("--no-plugin", "llama", "plan", "--hf-model", hf)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no installed plugin knows the architecture LlamaForCausalLM" in done.stderr


def test_no_plugin_leaves_one_out_of_the_help(installed: Installed) -> None:
    assert "  layers " not in installed.convert("--no-plugin", "llama", "--help")


# --- in conflict, or broken ----------------------------------------------------------------------

RIVAL = """
from gptoss_convert import ModelFamily, hookimpl

@hookimpl
def gptoss_convert_models():
    yield ModelFamily({name!r}, frozenset({{{architecture!r}}}), list, dict, dict)
"""
RIVAL_CODE = RIVAL.format(name="rival", architecture="Another")
BOTH = ("gptoss-convert-llama 0.2.0", "rival-llama 4.2")


def test_one_name_offered_twice_is_an_error(installed: Installed, hf: Path, tmp_path: Path) -> None:
    code = RIVAL.format(name="llama", architecture="Another")
    more = distribution(tmp_path / "more", "rival-llama", code)
    done = installed.run("plan", "--hf-model", str(hf), more=more)
    assert (done.returncode, done.stdout) == (1, "")
    assert all(name in done.stderr for name in BOTH)
    assert "both offer 'llama'" in done.stderr
    listed = installed.run("plugins", more=more).stdout  # which is how one finds out
    assert all(name in listed for name in BOTH)
    assert "both offer 'llama'" in " ".join(listed.split())
    again = installed.run("--no-plugin", "rival_llama", "plan", "--hf-model", hf, more=more)
    assert (again.returncode, again.stderr) == (0, "")


def test_one_architecture_claimed_twice_is_decided_by_the_user(
    installed: Installed, hf: Path, tmp_path: Path
) -> None:
    code = RIVAL.format(name="rival", architecture="LlamaForCausalLM")
    more = distribution(tmp_path / "more", "rival-llama", code)
    done = installed.run("plan", "--hf-model", hf, more=more)
    assert (done.returncode, done.stdout) == (1, "")
    assert all(name in done.stderr for name in BOTH)
    assert "choose with --model llama or rival" in done.stderr
    again = installed.run("plan", "--hf-model", hf, "--model", "llama", "--json", more=more)
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout)["model"] == "llama"


def test_one_entry_point_name_in_two_distributions_is_an_error(
    installed: Installed, hf: Path, tmp_path: Path
) -> None:
    more = distribution(tmp_path / "more", "rival-llama", RIVAL_CODE, point="llama")
    done = installed.run("plan", "--hf-model", hf, more=more)
    assert (done.returncode, done.stdout) == (1, "")
    assert all(name in done.stderr for name in BOTH)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('out of ideas')", "RuntimeError: out of ideas"),
        ("def (:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        (RIVAL_CODE.replace("_models()", "_models(config)"), "gptoss_convert_models(config)"),
    ],
    ids=["raises", "syntax", "import", "exits", "signature"],
)
def test_a_broken_plugin_takes_nobody_down(
    installed: Installed, hf: Path, tmp_path: Path, code: str, reason: str
) -> None:
    more = distribution(tmp_path / "more", "broken-plugin", code)
    done = installed.run("plan", "--hf-model", hf, "--json", more=more)
    assert done.returncode == 0
    assert json.loads(done.stdout)["model"] == "llama"
    assert "warning: plugin 'broken_plugin' of broken-plugin 4.2 did not load" in done.stderr
    assert reason in done.stderr
    listed = json.loads(installed.run("plugins", "--json", more=more).stdout)["plugins"]
    broken = {plugin["name"]: plugin["error"] for plugin in listed if plugin["error"]}
    assert list(broken) == ["broken_plugin"]
    assert reason in broken["broken_plugin"]


def test_a_misspelt_hook_is_an_error_that_names_the_right_one(
    installed: Installed, hf: Path, tmp_path: Path
) -> None:
    more = distribution(tmp_path / "more", "typo", RIVAL_CODE.replace("_models", "_modles"))
    done = installed.run("plan", "--hf-model", hf, more=more)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'typo' implements the unknown hook 'gptoss_convert_modles'" in done.stderr
    assert "did you mean gptoss_convert_models" in done.stderr
    assert "layers" not in done.stderr
    assert installed.run("--no-plugin", "typo", "plan", "--hf-model", hf, more=more).stdout


# --- converted -----------------------------------------------------------------------------------


def shapes(*, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Llama's tensors as transformers names them; test_logits checks that it does."""
    layer = {
        "input_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (HEADS * D, H),
        "self_attn.k_proj.weight": (GROUPS * D, H),
        "self_attn.v_proj.weight": (GROUPS * D, H),
        "self_attn.o_proj.weight": (H, HEADS * D),
        "post_attention_layernorm.weight": (H,),
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
    }
    return {
        "model.embed_tokens.weight": (V, H),
        "model.norm.weight": (H,),
        **({} if tied else {"lm_head.weight": (V, H)}),
        **{f"model.layers.{n}.{name}": s for n in range(LAYERS) for name, s in layer.items()},
    }


def random_tensors(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: (("norm" in name) + 0.3 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in names.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hf") / "llama", random_tensors(shapes()))


@pytest.fixture(scope="session")
def megatron(installed: Installed, hf: Path) -> Path:
    """The checkpoint, imported."""
    target = hf.with_name("megatron")
    said = installed.convert("import", "--hf-model", hf, "--megatron-path", target)
    assert said.startswith("imported llama: ")
    return target


def test_what_it_would_write(installed: Installed, hf: Path) -> None:
    plan = json.loads(installed.convert("plan", "--hf-model", hf, "--json"))
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": [48],
        "self_attention.linear_qkv.weight": [100, 48],
        "self_attention.linear_proj.weight": [48, 60],
        "mlp.linear_fc1.layer_norm_weight": [48],
        "mlp.linear_fc1.weight": [112, 48],
        "mlp.linear_fc2.weight": [48, 56],
    }
    written = {t["name"]: t["shape"] for step in plan["steps"] for t in step["outputs"]}
    assert written == {
        "embedding.word_embeddings.weight": [70, 48],
        "decoder.final_layernorm.weight": [48],
        "output_layer.weight": [70, 48],
        **{f"decoder.layers.{n}.{name}": shape for n in range(3) for name, shape in layer.items()},
    }
    assert plan["parameters"] == sum(torch.Size(shape).numel() for shape in shapes().values())


@pytest.mark.slow
def test_there_and_back(installed: Installed, hf: Path, megatron: Path, tmp_path: Path) -> None:
    installed.convert("export", "--megatron-path", megatron, "--hf-path", tmp_path / "back")
    assert_same_bits(read(tmp_path / "back"), read(hf))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.slow
def test_a_tied_embedding_stands_for_the_head(installed: Installed, tmp_path: Path) -> None:
    tensors = random_tensors(shapes(tied=True))
    unused = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    hf = write(tmp_path / "tied", tensors | unused, tie_word_embeddings=True)
    plan = json.loads(installed.convert("plan", "--hf-model", hf, "--json"))
    assert [drop["name"] for drop in plan["dropped"]] == ["lm_head.weight"]
    installed.convert("import", "--hf-model", hf, "--megatron-path", tmp_path / "megatron")
    back = ["--hf-path", str(tmp_path / "back")]
    installed.convert("export", "--megatron-path", tmp_path / "megatron", *back)
    assert_same_bits(read(tmp_path / "back"), tensors)


@pytest.mark.slow
def test_stored_in_its_codec(installed: Installed, hf: Path, tmp_path: Path) -> None:
    int8 = tmp_path / "int8"
    words = ["--codec", "int8-rowwise", "--hf-model", str(hf)]
    said = installed.convert("quantize", *words, "--hf-path", int8)
    assert "What int8-rowwise costs" in said
    assert (int8 / "tokenizer.json").read_bytes() == TOKENIZER
    declared = {"quant_method": "int8-rowwise", "modules_to_not_convert": UNQUANTIZED}
    written = json.loads((int8 / "config.json").read_text())
    assert written.pop("quantization_config") == declared
    assert CONFIG.items() <= written.items()
    before, stored = read(hf), read(int8)
    quantized = [name for name in before if name.endswith("_proj.weight")]
    assert len(quantized) == LAYERS * 7
    assert len(stored) == len(before) + len(quantized)
    for name in quantized:
        values, scale = stored[name + "_int8"], stored[name + "_scale"]
        assert (values.dtype, scale.shape) == (torch.int8, (len(values), 1))
        assert ((values * scale - before[name].float()).abs() <= scale / 2).all()
        # Scales of other makers are no powers of two; the product must then be rounded once.
        stored[name + "_scale"] = scale * torch.linspace(0.5, 1.7, len(scale))[:, None]
    save_file(stored, int8 / "model.safetensors")
    expected = {
        name: (stored[name + "_int8"].float() * stored[name + "_scale"]).bfloat16()
        if name in quantized
        else tensor
        for name, tensor in before.items()
    }
    installed.convert("import", "--hf-model", int8, "--megatron-path", tmp_path / "megatron")
    back = ["--hf-path", str(tmp_path / "back")]
    installed.convert("export", "--megatron-path", tmp_path / "megatron", *back)
    assert_same_bits(read(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG


@pytest.mark.slow
def test_exported_in_its_codec(
    installed: Installed, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """The way out of Megatron writes what quantizing the original does."""
    words = ["--codec", "int8-rowwise", "--hf-model", str(hf)]
    installed.convert("quantize", *words, "--hf-path", tmp_path / "quantized")
    words = ["--export-dtype", "int8-rowwise", "--megatron-path", str(megatron)]
    installed.convert("export", *words, "--hf-path", tmp_path / "exported")
    assert_same_bits(read(tmp_path / "exported"), read(tmp_path / "quantized"))


def test_parts_that_do_not_fit_are_named(installed: Installed, plugin: Any, tmp_path: Path) -> None:
    tensors = random_tensors(shapes())
    name = "model.layers.1.mlp.up_proj.weight"
    values, scale = plugin.encode(tensors.pop(name))
    parts = {name + "_int8": values, name + "_scale": scale.half()}
    quantization = {"quant_method": "int8-rowwise"}
    hf = write(tmp_path / "hf", tensors | parts, quantization_config=quantization)
    done = installed.run("plan", "--hf-model", hf)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{name}: I8 [56, 48] and F16 [56, 1] are not" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_without_a_config_takes_megatrons(
    installed: Installed, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(megatron, tmp_path / "bare")
    (bare / "iter_0000000" / "huggingface" / "config.json").unlink()
    words = ["--megatron-path", str(bare), "--hf-path", str(tmp_path / "back"), "--model", "llama"]
    done = installed.run("export", *words)
    assert done.returncode == 0, done.stderr
    assert "is made from Megatron's fields" in done.stderr
    assert_same_bits(read(tmp_path / "back"), read(hf))
    made = json.loads((tmp_path / "back" / "config.json").read_text())
    assert CONFIG.items() <= made.items()


# --- from the inside -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 10), (4, 4, 12), (5, 1, 8)])
def test_the_family_goes_round(plugin: Any, heads: int, groups: int, size: int, tied: bool) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size}
    (family,) = plugin.gptoss_convert_models()
    assert_roundtrip(family, CONFIG | sizes | {"tie_word_embeddings": tied})


def test_fields_that_old_configs_lack(plugin: Any) -> None:
    left_out = ("num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings")
    old = {name: value for name, value in CONFIG.items() if name not in left_out}
    made = plugin.megatron_config(old | {"head_dim": None})
    assert (made["num_query_groups"], made["kv_channels"]) == (HEADS, H // HEADS)
    assert made["rotary_base"] == 5000.0
    nested = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert plugin.megatron_config(CONFIG | nested)["rotary_base"] == 7.0


def test_a_scaled_rotary_embedding_is_refused(plugin: Any) -> None:
    for kind in ({"rope_type": "llama3", "factor": 8.0}, {"type": "linear", "factor": 2.0}):
        with pytest.raises(ConfigError, match="rope type"):
            plugin.megatron_config(CONFIG | {"rope_scaling": kind})


def test_absent_fields_are_told_at_once(installed: Installed, tmp_path: Path) -> None:
    hf = write(tmp_path / "hf", random_tensors(shapes()), vocab_size="many", hidden_size=None)
    done = installed.run("plan", "--hf-model", hf)
    assert (done.returncode, done.stdout) == (1, "")
    assert "vocab_size is 'many'" in done.stderr
    assert "hidden_size is None" in done.stderr


def test_decoding_is_exact_and_encoding_stable(plugin: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.linspace(-130, 120, 51)[:, None]
    tensor = (torch.randn(51, 33, generator=generator) * powers).bfloat16()
    tensor[5] = 0
    values, scale = parts = plugin.encode(tensor)
    decoded = plugin.decode(parts)
    assert torch.equal(decoded.double(), values.double() * scale.double())
    assert ((decoded.double() - tensor.double()).abs() <= scale.double() / 2).all()
    assert values[tensor.abs().amax(1) > 0].abs().amax(1).min() >= 64
    for first, second in zip(parts, plugin.encode(decoded), strict=True):
        assert torch.equal(first, second)
    out = torch.empty(51 * 33, dtype=torch.bfloat16)
    assert plugin.decode(parts, out).data_ptr() == out.data_ptr()
    assert torch.equal(out.view(51, 33), decoded)


@pytest.mark.parametrize("shape", [(48, 56), (5, 6), (3, 64)])
def test_the_codec_keeps_the_contract(plugin: Any, shape: tuple[int, int]) -> None:
    (codec,) = plugin.gptoss_convert_codecs()
    spec = TensorSpec(shape, "BF16")
    assert_codec(codec, spec, tolerance=1 / 128, signed_zeros=False, any_bytes=())
    with pytest.raises(ValueError, match="for matrices"):
        codec.parts(TensorSpec((2, *shape), "BF16"))
    for bad in (float("nan"), float("-inf")):
        tensor = torch.zeros(shape)
        tensor[1, 2] = bad
        with pytest.raises(EncodeError, match="holds NaN or infinity") as caught:
            codec.encode(tensor)
        assert caught.value.row == 1


def test_the_codec_knows_its_own(plugin: Any) -> None:
    (codec,) = plugin.gptoss_convert_codecs()
    assert codec.matches({"quantization_config": {"quant_method": "int8-rowwise"}})
    assert not codec.matches({"quantization_config": {"quant_method": "mxfp4"}})
    assert not codec.matches({"quantization_config": None})
    parts = [TensorSpec((5, 8), "I8"), TensorSpec((5, 1), "F32")]
    assert codec.spec(parts) == TensorSpec((5, 8), "BF16")
    for wrong in (TensorSpec((8, 1), "F32"), TensorSpec((5,), "F32"), TensorSpec((5, 1), "BF16")):
        with pytest.raises(ValueError, match="are not"):
            codec.spec([parts[0], wrong])


# --- the model it makes --------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Any:
    """megatron-core in a world of one process, on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    shim = runpy.run_path(
        str(TESTS.parent / "plugins" / "gptoss_plugins" / "gpt_model" / "cpu_shim.py")
    )
    try:
        with shim["cuda_means_cpu"](), torch.no_grad():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def stock_model(fields: dict[str, Any]) -> Any:
    """megatron-core's GPTModel with its own local layer spec, in float32."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = {name: value for name, value in fields.items() if name in known}
    assert config["activation_func"] == "silu"
    config["activation_func"] = torch.nn.functional.silu
    unfused = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
    return GPTModel(
        TransformerConfig(**config, **dict.fromkeys(unfused, False), use_cpu_initialization=True),
        get_gpt_layer_local_spec(normalization=fields["normalization"]),
        vocab_size=fields["vocab_size"],
        max_sequence_length=fields["seq_length"],
        position_embedding_type=fields["position_embedding_type"],
        rotary_base=fields["rotary_base"],
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        parallel_output=False,
    ).eval()


def load(model: Any, folder: Path) -> None:
    """As Megatron does: everything the model asks for must be there."""
    from megatron.core import dist_checkpointing, parallel_state

    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    stored = dist_checkpointing.load_content_metadata(str(folder)) or {}
    wanted = model.sharded_state_dict(metadata={**stored, "dp_cp_group": replicas})
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))
    model.load_state_dict(loaded["model"], strict=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of megatron-core: no Transformer Engine, no Apex
def test_logits_are_those_of_transformers(plugin: Any, hf: Path, megatron: Path) -> None:
    from transformers import LlamaForCausalLM

    ids = torch.randint(0, V, (2, 60), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(60).expand_as(ids)
    hidden = torch.ones(1, 1, 60, 60).triu(1).bool()
    reference, report = LlamaForCausalLM.from_pretrained(
        hf, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        theirs = reference.eval()(ids).logits
    fields = plugin.megatron_config(CONFIG)
    found = {}
    with one_rank():
        for base in (CONFIG["rope_theta"], 10000.0):  # the wrong one must show
            model = stock_model(fields | {"rotary_base": base})
            load(model, megatron / "iter_0000000")
            ours = model(ids, positions, hidden)
            found[base] = ((ours - theirs).norm() / theirs.norm()).item()
    assert found[CONFIG["rope_theta"]] < 1e-5
    assert found[10000.0] > 1e-2
