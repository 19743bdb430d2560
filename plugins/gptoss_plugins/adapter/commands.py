"""``gptoss-convert adapter``: import, export and merge LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.options import (
    Folder,
    common_options,
    encode_options,
    export_dtype_option,
    hf_model_option,
    hf_path_option,
    megatron_option,
    revision_option,
    run_options,
    together,
    torch_dtype_option,
)
from gptoss_convert.program import choice_of, converted, echo_json, registry_of, required
from gptoss_plugins.adapter.option import adapter_option

if TYPE_CHECKING:
    from pathlib import Path

_base_options = together(hf_model_option, revision_option, megatron_option)
_name_option = click.option(
    "--base-name",
    metavar="ID",
    help="What the result is to call the model that it is for; a hub id or a path.",
)


@click.group("adapter")
def adapter() -> None:
    """LoRA adapters between PEFT and Megatron, and into a model's weights."""


@adapter.command("import")
@adapter_option
@click.option("--output", type=Folder(), help="Megatron folder to write.")
@_base_options
@_name_option
@click.option(
    "--uniform-rank",
    is_flag=True,
    help="Pad all ranks to the highest with zeros: Megatron-Bridge knows one rank for all.",
)
@torch_dtype_option
@run_options
@common_options
@click.pass_context
def import_adapter(
    ctx: click.Context,
    /,
    adapter: str | None,
    output: Path | None,
    base_name: str | None,
    torch_dtype: str | None,
    uniform_rank: bool,
    **rest: Any,
) -> None:
    """PEFT adapter -> Megatron: a torch_dist checkpoint of the adapter alone.

    --hf-model or --megatron-path names the model that it is for; its weights are not read. Modules
    that Megatron fuses (q, k and v) become one adapter: of the same rank if they share A, else of all
    ranks together, with zeros where a module's adapter does not reach. Either computes the same.
    """
    from gptoss_plugins.adapter.bases import model_of
    from gptoss_plugins.adapter.opening import open_adapter
    from gptoss_plugins.adapter.writing import prepare_adapter_import

    registry, target = registry_of(ctx), required(output, "--output")
    path = required(adapter, "--adapter")
    model = model_of(registry, choice_of(**rest), **rest)
    found = open_adapter(path, model.family, model.config, registry, model.name)
    found.require_side("hf")
    conversion = prepare_adapter_import(
        found,
        model.family,
        model.config,
        registry,
        config_file=model.config_file,
        base=base_name or model.hub_id,
        torch_dtype=torch_dtype,
        uniform_rank=uniform_rank,
    )
    _finish(converted(conversion, target, **rest), found, rest["as_json"])


@adapter.command("export")
@adapter_option
@click.option("--output", type=Folder(), help="PEFT folder to write.")
@_base_options
@_name_option
@torch_dtype_option
@run_options
@common_options
@click.pass_context
def export_adapter(
    ctx: click.Context,
    /,
    adapter: str | None,
    output: Path | None,
    base_name: str | None,
    torch_dtype: str | None,
    **rest: Any,
) -> None:
    """Megatron adapter -> PEFT: adapter_config.json and adapter_model.safetensors.

    Attention becomes q, k, v and o modules, experts become target_parameters, as PEFT lays them out for
    transformers' model. --hf-model or --megatron-path names the model where the adapter's checkpoint
    carries no config of it.
    """
    from gptoss_plugins.adapter.bases import model_of, own_model
    from gptoss_plugins.adapter.opening import open_adapter
    from gptoss_plugins.adapter.writing import prepare_adapter_export

    registry, target = registry_of(ctx), required(output, "--output")
    path, choice = required(adapter, "--adapter"), choice_of(**rest)
    is_named = rest["hf_model"] or rest["megatron_path"]
    model = model_of(registry, choice, **rest) if is_named else own_model(path, registry, choice)
    found = open_adapter(path, model.family, model.config, registry, model.name)
    found.require_side("megatron")
    conversion = prepare_adapter_export(
        found,
        model.family,
        model.config,
        registry,
        base=base_name or model.hub_id,
        torch_dtype=torch_dtype,
    )
    _finish(converted(conversion, target, **rest), found, rest["as_json"])


@adapter.command("merge")
@adapter_option
@_base_options
@hf_path_option
@click.option("--output", type=Folder(), help="Megatron folder to write.")
@export_dtype_option
@encode_options
@run_options
@common_options
@click.pass_context
def merge_adapter(
    ctx: click.Context,
    /,
    adapter: str | None,
    hf_path: Path | None,
    output: Path | None,
    export_dtype: str | None,
    **rest: Any,
) -> None:
    """Model and adapter -> the model with the adapter in its weights.

    --hf-model or --megatron-path is the model, in any format. --hf-path writes a Hugging Face checkpoint,
    in BF16 or in a codec's form (--export-dtype mxfp4); --output a Megatron one. Computed in float32 and
    rounded once; what that costs is told, tensor by tensor.
    """
    from gptoss_convert.logical import open_logical
    from gptoss_plugins.adapter.bases import require_one
    from gptoss_plugins.adapter.opening import open_adapter
    from gptoss_plugins.adapter.printing import print_merge, to_json
    from gptoss_plugins.adapter.writing_merged import prepare_merge

    registry, choice = registry_of(ctx), choice_of(**rest)
    path = required(adapter, "--adapter")
    if (hf_path is None) == (output is None):
        raise click.UsageError("say where to write, with --hf-path or with --output")
    base_path = require_one(**rest)
    base = open_logical(base_path, registry, choice, revision=rest["hf_revision"])
    found = open_adapter(path, base.family, base.config, registry, base_path)
    conversion, merged = prepare_merge(
        base, found, registry, choice, to_hf=hf_path is not None, export_dtype=export_dtype
    )
    result = converted(conversion, hf_path or output, **rest)  # type: ignore[arg-type]
    if result.finished:
        if rest["as_json"]:
            echo_json(to_json(result, found, merged.rounding))
        else:
            print_merge(result, found, merged.rounding)


def _finish(result: Any, found: Any, as_json: bool) -> None:
    from gptoss_plugins.adapter.printing import print_adapter, to_json

    if result.finished:
        echo_json(to_json(result, found)) if as_json else print_adapter(result, found)
