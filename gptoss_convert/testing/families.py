"""Small checkpoints to try a model family on, and the check that matters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.fit import expand
from gptoss_convert.plan import make_plan
from gptoss_convert.types import Config, ModelFamily, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


def hf_specs(family: ModelFamily, config: Config, dtype: str = "BF16") -> dict[str, TensorSpec]:
    """Every Hugging Face tensor that a family's table asks for under a config."""
    layers = family.megatron_config(config)["num_layers"]
    return {
        (name if layer is None else name.replace("{L}", str(layer))): TensorSpec(shape, dtype)
        for rule, layer in expand(family.rules(config), layers)
        for name, shape in rule.hf.items()
    }


def distinct(spec: TensorSpec, seed: int) -> Tensor:
    """Random finite values, scaled like weights, different for every seed and place.

    bfloat16 has few values in any range, so equal neighbours are possible; two tensors that were
    exchanged, transposed or shifted still differ almost everywhere.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.shape, generator=generator).mul_(0.1).to(torch_dtype(spec.dtype))


def make_tensors(family: ModelFamily, config: Config, dtype: str = "BF16") -> dict[str, Tensor]:
    """A whole checkpoint of :func:`distinct` tensors, by Hugging Face name."""
    specs = hf_specs(family, config, dtype)
    return {name: distinct(spec, seed) for seed, (name, spec) in enumerate(specs.items())}


def write_hf_folder(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 2,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a Hugging Face checkpoint with the safetensors library itself.

    Args:
        folder: is created.
        config: goes to ``config.json``.
        tensors: by name, in the order they are spread over the shards.
        shards: how many files; one needs no index.
        files: further files, such as a tokenizer's.

    """
    from safetensors.torch import save

    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number:05d}-of-{shards - 1:05d}.safetensors"
        if shards == 1:
            file = "model.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        data = save({n: tensors[n].contiguous() for n in mine})  # its save_file hides OSErrors
        (folder / file).write_bytes(data)
        weight_map.update(dict.fromkeys(mine, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    return folder


def assert_roundtrip(family: ModelFamily, config: Config, dtype: str = "BF16") -> None:
    """Every rule, forwards and back, returns the same bits, whole and cut into its units.

    Also checks that the table takes every tensor (a plan can be made), that both configs turn
    into one another, and that each op says of itself what it does.

    Raises:
        AssertionError: naming the tensor that came back different.

    """
    specs = hf_specs(family, config, dtype)
    plan = make_plan("import", specs, family, config, where="assert_roundtrip")
    tensors = make_tensors(family, config, dtype)
    for step in plan.steps:
        parts = [tensors[i.name] for i in step.inputs]
        made = step.rule.op.forward(parts).reshape(step.outputs[0].spec.shape)
        _assert_same([i.name for i in step.inputs], parts, step.rule.op.inverse(made))
        _assert_cuts(step.rule.op.forward, parts, made, step.units, step.outputs[0].name)
    fields = family.megatron_config(config)
    again = family.megatron_config(family.hf_config(fields))
    assert again == fields, f"hf_config does not invert megatron_config: {again} != {fields}"


def _assert_same(names: Sequence[str], before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    import torch

    for name, old, new in zip(names, before, after, strict=True):
        assert torch.equal(old, new.reshape(old.shape)), f"{name} came back different"


def _assert_cuts(
    forward: Callable[[Sequence[Tensor]], Tensor],
    parts: Sequence[Tensor],
    made: Tensor,
    units: int,
    name: str,
) -> None:
    """Rewriting unit by unit gives the rows that rewriting the whole gives."""
    import torch

    if units == 1:
        return
    cuts = zip(*(part.chunk(units, 0) for part in parts), strict=True)
    rows = [forward(cut).reshape(-1) for cut in cuts]
    assert torch.equal(torch.cat(rows), made.reshape(-1)), f"{name} cannot be cut into {units}"
