"""``verify --html``: one page that needs nothing else, with a heat map of layers by tensors."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from gptoss_convert.blockio import write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_plugins.verify.checking import Report
    from gptoss_plugins.verify.values import Compared

_LEAST, _MOST = (
    -6.0,
    0.0,
)  # decimal exponents of the relative error between the palest and the reddest
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2330}
h1{font-size:1.35rem}h2{font-size:1.05rem;margin-top:2rem}
.verdict{padding:.6rem .9rem;border-radius:.4rem;background:#e3f4e6}.verdict.bad{background:#fbe3e1}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}
th,td{padding:.2rem .5rem;text-align:right;white-space:nowrap}th{font-weight:600}
td:first-child,th:first-child{text-align:left}tr:nth-child(even) td{background:#f6f7f9}
.map td,.map tr:nth-child(even) td{padding:0;border:1px solid #fff}.map td.cell{width:2.1rem;height:1.5rem}
.map th.tensor{height:11rem;vertical-align:bottom}.map th.tensor span{writing-mode:vertical-rl;
transform:rotate(180deg);font-weight:400}.legend span{display:inline-block;width:1.6rem;height:.9rem;
margin:0 .3rem 0 1rem;vertical-align:middle;border:1px solid #ccc}
li.error{color:#a4231b}li.warning{color:#8a5a00}
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page to a file."""
    write_file(path.absolute(), "".join(_page(report)).encode())


def _page(report: Report) -> Iterator[str]:
    names = " and ".join(map(escape, report.paths))
    verdict = "sound" if report.is_sound else "not sound"
    mood = "" if report.is_sound else " bad"
    yield "<!doctype html><html lang=en><meta charset=utf-8>"
    yield "<meta name=viewport content='width=device-width,initial-scale=1'>"
    yield f"<title>verify {names}</title><style>{_STYLE}</style>"
    yield f"<h1>verify {names}</h1><p class='verdict{mood}'>{verdict}; "
    yield f"{len(report.findings)} findings in {report.seconds:.1f} s</p>"
    if report.findings:
        yield "<h2>Findings</h2><ul>"
        for found in report.findings:
            text = f"<b>{escape(found.where)}</b>: {escape(found.what)}"
            yield f"<li class={found.severity}>{text}; <i>{escape(found.remedy)}</i></li>"
        yield "</ul>"
    if report.logits:
        yield "<h2>Logits</h2><table>"
        for name, value in report.logits.items():
            if not isinstance(value, (list, dict)):
                yield f"<tr><td>{escape(name.replace('_', ' '))}<td>{escape(str(value))}"
        yield "</table>"
    if report.values and report.values.tensors and len(report.paths) > 1:
        tensors = list(report.values.tensors.values())
        yield from _heat_map(tensors)
        yield from _table(tensors)
    yield "</html>\n"


def _heat_map(tensors: list[Compared]) -> Iterator[str]:
    """Rows are layers, columns tensors; what stands outside the layers has the first row."""
    layers = sorted({t.layer for t in tensors if t.layer is not None})
    cells: dict[tuple[int | None, str], Compared] = {(t.layer, _short(t)): t for t in tensors}
    for title, kinds, rows in (
        ("Layers", [_short(t) for t in tensors if t.layer is not None], layers),
        ("Outside the layers", [_short(t) for t in tensors if t.layer is None], [None]),
    ):
        columns = list(dict.fromkeys(kinds))
        if not columns:
            continue
        yield f"<h2>{title}</h2><div class=scroll><table class=map><tr><th>"
        yield from (f"<th class=tensor><span>{escape(name)}</span>" for name in columns)
        for layer in rows:
            yield f"<tr><th>{'' if layer is None else layer}"
            yield from (_cell(cells.get((layer, name))) for name in columns)
        yield "</table></div>"
    yield "<p class=legend>relative error"
    for exponent in (None, -6, -4, -2, 0):
        text = "equal" if exponent is None else f"10<sup>{exponent}</sup>"
        yield f"<span style='background:{_color(0 if exponent is None else 10.0**exponent)}'></span>{text}"
    yield "</p>"


def _cell(tensor: Compared | None) -> str:
    if tensor is None:
        return "<td class=cell style='background:#888' title='not compared'>"
    found = tensor.difference
    error = 0.0 if found.is_equal else max(found.relative, 1e-12)
    title = f"{tensor.name}: {'equal' if found.is_equal else f'{error:.3g}'}"
    return f"<td class=cell style='background:{_color(error)}' title='{escape(title, quote=True)}'>"


def _color(error: float) -> str:
    """Green for equal, then from pale yellow to dark red by the order of magnitude."""
    if error == 0:
        return "#cdeccf"
    place = (math.log10(error) - _LEAST) / (_MOST - _LEAST) if math.isfinite(error) else 1.0
    place = min(1.0, max(0.0, place))
    return f"hsl({50 - 50 * place:.0f},90%,{82 - 42 * place:.0f}%)"


def _short(tensor: Compared) -> str:
    """The name without the layer."""
    if tensor.layer is None:
        return tensor.name
    return tensor.name.split(f".{tensor.layer}.", 1)[-1]


def _table(tensors: list[Compared]) -> Iterator[str]:
    heads = ("shape", "types", "equal", "max error", "relative error", "cosine", "blocks equal")
    yield "<h2>Tensors</h2><div class=scroll><table><tr><th>tensor"
    yield from (f"<th>{head}" for head in heads)
    for tensor in tensors:
        found = tensor.difference
        cells = (
            str(list(tensor.shape)),
            " ".join(dict.fromkeys(tensor.dtypes)),
            "all" if found.is_equal else f"{found.equal:,} of {found.elements:,}",
            f"{found.largest:.3g}",
            f"{found.relative:.3g}",
            "" if found.cosine is None else f"{found.cosine:.6f}",
            f"{found.equal_blocks:,} of {found.blocks:,}" if found.blocks else "",
        )
        yield f"<tr><td>{escape(tensor.name)}" + "".join(f"<td>{escape(c)}" for c in cells)
    yield "</table></div>"
