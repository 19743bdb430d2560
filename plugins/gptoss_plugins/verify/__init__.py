"""``gptoss-convert verify``: is a checkpoint sound, and are two of them the same model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import hookimpl
from gptoss_convert.options import (
    Checkpoint,
    common_options,
    hf_model_option,
    revision_option,
)
from gptoss_convert.program import choice_of, echo_json, registry_of
from gptoss_plugins.adapter.option import adapter_option
from gptoss_plugins.verify.options import Tolerance, logits_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_convert.types import Validator

MISMATCH = 3


@click.command("verify")
@click.argument("first", type=Checkpoint(), metavar="A")
@click.argument("second", type=Checkpoint(), metavar="[B]", required=False)
@click.option(
    "--values/--headers",
    default=None,
    help="Read all tensors, or headers and config only. Of two checkpoints values are compared "
    "unless --headers says otherwise.",
)
@click.option(
    "--tolerance",
    type=Tolerance(),
    default=0.0,
    show_default=True,
    help="Relative error (RMS) up to which a tensor counts as the same.",
)
@click.option(
    "--logits",
    is_flag=True,
    help="Run both models on a prompt: transformers' for Hugging Face's checkpoints, megatron-core's "
    "GPTModel for Megatron's.",
)
@logits_options
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page too.")
@adapter_option
@hf_model_option
@revision_option
@click.option("--workers", type=click.IntRange(1), help="Pieces at work side by side.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@common_options
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    first: str,
    second: str | None,
    values: bool | None,
    tolerance: float,
    logits: bool,
    prompt_length: int,
    device: str | None,
    logits_tolerance: float | None,
    torch_dtype: str | None,
    html: Path | None,
    adapter: str | None,
    hf_model: str | None,
    hf_revision: str | None,
    workers: int | None,
    no_progress: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Check a checkpoint, or compare two of any formats, tensor by tensor.

    A and B are checkpoint folders or hub ids, in any format that this program reads. B is judged by
    A, which is the one that is right. --hf-model names a reference for a Megatron checkpoint that
    carries no config of its model. --adapter adds a LoRA adapter to A, as adapter merge would: so that
    B, merged somewhere, can be judged.

    A alone is held against the manifest.json that was written with it (not with --headers), so that
    a flipped bit is found and its tensor named; --values looks at all numbers, too. A may be an adapter.

    As one of several processes (torchrun, srun) it reads its share, and the last one tells the result.

    Exit code 3 if something is wrong: a damaged file, a tensor that is missing or differs, a config
    that lost what the model needs, one of the known bad states (docs/verify.md).
    """
    from gptoss_convert.convert import open_source
    from gptoss_convert.crew import current_crew
    from gptoss_convert.errors import ConvertError
    from gptoss_convert.progress import reporting
    from gptoss_plugins.adapter.opening import adapter_source
    from gptoss_plugins.verify.checking import (
        Report,
        check,
        check_adapter,
        check_bytes,
        open_both,
    )
    from gptoss_plugins.verify.printing import print_report
    from gptoss_plugins.verify.values import nbytes

    registry, choice = registry_of(ctx), choice_of(**rest)
    if logits and not second:
        raise click.UsageError("--logits compares two checkpoints; name a second one")
    paths = (first, second) if second else (first,)
    report = Report(paths, tolerance=tolerance)
    crew, is_whole = current_crew(), True
    if logits and crew.size > 1:
        raise click.UsageError("--logits runs in one process; on several there is roundtrip")
    alone = second is None and values is not False and Path(first).is_dir()
    if alone and crew.rank == 0:
        check_bytes(first, report, workers=workers, show=not no_progress)
    reference = None
    if hf_model:
        try:
            reference = open_source(
                hf_model, "hf", registry=registry, revision=hf_revision, headers_only=True
            ).config
        except ConvertError as error:
            report.take(hf_model, error)
    if second is None and (lone := adapter_source(first, registry)) is not None:
        check_adapter(first, lone, report)
        opened = []
    else:
        opened = open_both(
            paths, registry, choice, report, reference=reference, revision=hf_revision
        )
    report.formats = [one.format for one in opened]
    wanted = bool(second) if values is None else values
    if len(opened) == len(paths):
        one, *two = opened
        if adapter:
            from gptoss_plugins.adapter.merging import with_adapter

            one = with_adapter(one, adapter, registry, is_exact=False)
        other = two[0] if two else None
        total = nbytes(one, other) // crew.size if wanted else 0
        show = wanted and not no_progress and crew.rank == 0
        with reporting("verify", total, show=show) as progress:
            is_whole = check(
                one,
                other,
                report,
                registry,
                values=wanted,
                sinks=values is None and not second,
                workers=workers,
                progress=progress,
            )
        if logits and other and is_whole:
            from gptoss_plugins.verify.logits import check_logits

            check_logits(
                one,
                other,
                report,
                registry,
                length=prompt_length,
                dtype=torch_dtype,
                device=device,
                limit=logits_tolerance,
            )
    if not is_whole:
        return
    if html:
        from gptoss_plugins.verify.page import write_page

        write_page(report, html)
    echo_json(report.to_json()) if as_json else print_report(report)
    if not report.is_sound:
        ctx.exit(MISMATCH)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One."""
    yield verify


@hookimpl
def gptoss_convert_validators() -> Iterator[Validator]:
    """The known bad states."""
    from gptoss_plugins.verify.states import validators

    yield from validators()
