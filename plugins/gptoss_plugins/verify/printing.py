"""What ``verify`` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from gptoss_convert.errors import MOST_SHOWN, printable

if TYPE_CHECKING:
    from gptoss_plugins.verify.checking import Report

_MOST_ROWS = 60


def print_report(report: Report) -> None:
    """A row per tensor that differs, what was found, the verdict."""
    if report.values and len(report.paths) > 1:
        _print_tensors(report)
    if report.logits:
        _print_logits(report)
    for finding in report.findings[:MOST_SHOWN]:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        click.echo(printable(f"{finding.severity}: {finding.where}: {finding.what}{remedy}"))
    if (rest := len(report.findings) - MOST_SHOWN) > 0:
        click.echo(f"... and {rest} more findings (--json lists all)")
    click.echo(_verdict(report))


def _verdict(report: Report) -> str:
    names = " and ".join(report.paths)
    if not report.is_sound:
        errors = sum(finding.severity == "error" for finding in report.findings)
        return f"{names}: {errors} error{'s' * (errors > 1)} in {report.seconds:.1f} s"
    held = "" if report.files is None else f"all {report.files} files are as they were written, "
    if report.values is None:
        return f"{names}: {held}complete, and headers and config are sound ({report.seconds:.1f} s)"
    count = len(report.values.tensors)
    if len(report.paths) == 1:
        return f"{names}: {held}sound, {count} tensors read in {report.seconds:.1f} s"
    equal = sum(tensor.difference.is_equal for tensor in report.values.tensors.values())
    if equal == count:
        return (
            f"{names}: the same, all {count} tensors bit for bit in value ({report.seconds:.1f} s)"
        )
    within = f"{count - equal} within --tolerance {report.tolerance:g}"
    return f"{names}: {equal} of {count} tensors equal, {within} ({report.seconds:.1f} s)"


def _print_tensors(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    assert report.values is not None
    every = list(report.values.tensors.values())
    rows = [t for t in every if not t.difference.is_equal]
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for name in (
        "shape",
        "dtypes",
        "equal",
        "max error",
        "relative error",
        "cosine",
        "blocks equal",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in rows[:_MOST_ROWS]:
        found = tensor.difference
        blocks = f"{found.equal_blocks / found.blocks:.2%}" if found.blocks else ""
        table.add_row(
            printable(tensor.name),
            str(list(tensor.shape)),
            " ".join(dict.fromkeys(tensor.dtypes)),
            "all" if found.is_equal else f"{found.equal / max(1, found.elements):.2%}",
            f"{found.largest:.3g}",
            f"{found.relative:.3g}",
            "" if found.cosine is None else f"{found.cosine:.6f}",
            blocks,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if len(rows) > _MOST_ROWS:
        click.echo(f"... and {len(rows) - _MOST_ROWS} more tensors (--json or --html have all)")
    if len(rows) < len(every):
        click.echo(f"The other {len(every) - len(rows)} tensors are equal.")


def _print_logits(report: Report) -> None:
    found = report.logits
    assert found is not None
    click.echo(
        f"logits of {found['positions']} positions in {found['dtype']}: relative error "
        f"{found['relative_error']:.3g} (limit {found['limit']:g}), largest {found['max_error']:.3g}, "
        f"median {found['median_error']:.3g}, cosine {found['cosine']:.8f}, KL {found['kl_mean']:.3g}, "
        f"same most likely token at {found['argmax_agreement']:.2%}"
    )
