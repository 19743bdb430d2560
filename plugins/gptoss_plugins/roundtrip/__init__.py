"""``gptoss-convert roundtrip``: a Megatron checkpoint in the real parallel model, and back."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import hookimpl
from gptoss_convert.errors import ConfigError, MismatchError
from gptoss_convert.options import (
    common_options,
    hf_model_option,
    layout_options,
    megatron_option,
    revision_option,
)
from gptoss_convert.program import choice_of, echo_json, layout_of, registry_of, required
from gptoss_plugins.gpt_model.installed import require_installed
from gptoss_plugins.verify.options import logits_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_convert.logical import Logical
    from gptoss_plugins.roundtrip.running import Outcome, Row

MISMATCH = 3


@click.command("roundtrip")
@hf_model_option
@revision_option
@megatron_option
@layout_options
@click.option(
    "--logits/--no-logits",
    default=True,
    show_default=True,
    help="Run both models, too. Rank 0 then also holds transformers' model.",
)
@logits_options
@common_options
@click.pass_context
def roundtrip(
    ctx: click.Context,
    /,
    hf_model: str | None,
    hf_revision: str | None,
    megatron_path: Path | None,
    torch_dtype: str | None,
    device: str | None,
    logits: bool,
    prompt_length: int,
    logits_tolerance: float | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Megatron checkpoint -> the parallel GPTModel -> Hugging Face's tensors, compared.

    Loads --megatron-path into the model that trains, spread as --tp, --pp, --vpp and --ep say,
    gathers the weights from all ranks, and holds every tensor and the logits against --hf-model. Run
    it alone, or with python -m torch.distributed.run --nproc_per_node=N. Exit code 3 if something
    does not match.
    """
    from gptoss_convert.logical import open_logical

    require_installed(
        "running both models", "megatron", "transformers", extras="megatron,transformers"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
        from gptoss_plugins.gpt_model.world import world_of
        from gptoss_plugins.roundtrip.running import round_trip
    from gptoss_plugins.verify.logits import precision

    registry, choice, layout = registry_of(ctx), choice_of(**rest), layout_of(**rest)
    model = open_logical(
        required(hf_model, "--hf-model-id"), registry, choice, revision=hf_revision
    )
    checkpoint = open_logical(
        required(megatron_path, "--megatron-path"), registry, choice, config=model.config
    )
    _require_sides(model, checkpoint)
    _require_fit(model, checkpoint)
    _require_one_model(model, checkpoint)
    dtype = precision(torch_dtype, device)
    with world_of(layout, device) as place:
        outcome = round_trip(
            model,
            checkpoint,
            layout,
            registry,
            place,
            dtype=dtype,
            prompt_length=prompt_length if logits else None,
            limit=logits_tolerance,
        )
    if outcome is None:
        return
    echo_json(outcome.to_json()) if as_json else _print(outcome)
    if not outcome.is_good:
        ctx.exit(MISMATCH)


def _require_fit(*checkpoints: Any) -> None:
    from gptoss_convert.errors import PlanError

    for one in checkpoints:
        if one.problems:
            raise PlanError(str(one.source.path), one.problems)


def _require_sides(model: Logical, checkpoint: Logical) -> None:
    for one, side, option, kind in (
        (model, "hf", "--hf-model-id", "Hugging Face"),
        (checkpoint, "megatron", "--megatron-load-path", "Megatron"),
    ):
        if one.side != side:
            raise ConfigError(
                f"{one.source.path}: is in the format {one.format}, and {option} takes a {kind} "
                f"checkpoint; name one"
            )


def _require_one_model(model: Logical, checkpoint: Logical) -> None:
    from gptoss_plugins.verify.states import same_shapes

    wrong = [f"{found.where} {found.what}" for found in same_shapes(model, checkpoint)]
    if model.steps.keys() != checkpoint.steps.keys():
        layers = (one.fields["num_layers"] for one in (checkpoint, model))
        wrong.append("has {} layers where A has {}".format(*layers))
    if wrong:
        raise MismatchError(
            f"{checkpoint.source.path}: is another model than {model.source.path} (A): {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
            + "; name two checkpoints of one model"
        )


def _match(row: Row) -> str:
    if row.match:
        return "yes"
    if row.nonfinite != (0, 0):
        return "NO, NaN or infinite in {}, in the model {}".format(*row.nonfinite)
    return f"NO, off by {row.max_error:.3g}"


def _print(outcome: Outcome) -> None:
    """A row per tensor, then the logits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for name in ("shape", "dtype", "match"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in outcome.rows:
        table.add_row(row.name, str(list(row.shape)), row.dtype, _match(row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    wrong = sum(not row.match for row in outcome.rows)
    count = len(outcome.rows)
    click.echo(
        f"{count - wrong} of {count} tensors match; {outcome.world} ranks ({outcome.layout}), model in "
        f"{outcome.dtype}, {outcome.seconds:.1f} s"
    )
    if found := outcome.logits:
        verdict = "ok" if found["relative_error"] <= outcome.limit else "TOO FAR"
        click.echo(
            f"logits of {found['positions']} positions: {verdict}, relative error "
            f"{found['relative_error']:.3g} (limit {outcome.limit:g}), largest {found['max_error']:.3g}, "
            f"cosine {found['cosine']:.8f}, KL {found['kl_mean']:.3g}, same most likely token at "
            f"{found['argmax_agreement']:.2%}"
        )


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One."""
    yield roundtrip
