"""The building blocks of the report page: tinted tables, bars, intervals, pictures. HTML in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from h3scale.evaluation.findings import Findings
from h3scale.evaluation.report_colours import colour_of, css_name
from h3scale.evaluation.report_plots import Picture

NAMES = {"fused_init": "fused, before training", "mixture": "mixture (control)"}


def shown_name(model: str) -> str:
    return escape(NAMES.get(model, model.replace("_", " ")))


def css_colour(findings: Findings, alignment: str | None) -> str:
    return f"var({css_name(colour_of(alignment, findings.alignments))})"


def dot(findings: Findings, alignment: str | None) -> str:
    return f'<i class="dot" style="background:{css_colour(findings, alignment)}"></i>'


def mean_of(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _heads(findings: Findings, last: str = "mean") -> str:
    heads = "".join(f'<th scope="col">{dot(findings, a)}{escape(a)}</th>' for a in findings.alignments)
    return f'<thead><tr><th></th>{heads}<th scope="col">{last}</th></tr></thead>'


def heat_table(findings: Findings, rows: Sequence[tuple[str, bool, Mapping[str, Any]]]) -> str:
    """Rows of (name, is it the main one, NLL entries by alignment)."""
    columns = {a: [entries[a]["nll"] for _, _, entries in rows if a in entries] for a in findings.alignments}
    means = [mean_of(entry["nll"] for entry in entries.values()) for _, _, entries in rows]
    body = []
    for (name, is_main, entries), mean in zip(rows, means, strict=True):
        cells = [_heat_cell(findings, a, entries.get(a), columns[a]) for a in findings.alignments]
        best = ' class="best"' if mean == min(means) and len(rows) > 1 else ""
        row = "".join(cells) + f"<td{best}>{mean:.3f}</td>"
        body.append(f'<tr{" class=main" if is_main else ""}><th scope="row">{shown_name(name)}</th>{row}</tr>')
    return plain_table(_heads(findings), body, len(findings.alignments) + 1)


def plain_table(heads: str, body: Sequence[str], columns: int, kind: str = "") -> str:
    """A table whose rows become two lines on a phone: the row's name, then `columns` equal cells."""
    name = f' class="{kind}"' if kind else ""
    return f'<table{name} style="--columns:{columns}">{heads}<tbody>{"".join(body)}</tbody></table>'


def _heat_cell(findings: Findings, alignment: str, entry: Mapping[str, float] | None, column: Sequence[float]) -> str:
    if entry is None:
        return "<td></td>"
    share = (max(column) - entry["nll"]) / max(max(column) - min(column), 1e-12)
    tint = f"background:color-mix(in srgb,{css_colour(findings, alignment)} {4 + 30 * share**2:.0f}%,transparent)"
    best = ' class="best"' if entry["nll"] == min(column) and len(column) > 1 else ""
    interval = f"<small>{entry['low']:.3f} to {entry['high']:.3f}</small>" if "low" in entry else ""
    return f'<td{best} style="{tint}">{entry["nll"]:.3f}{interval}</td>'


def forest(findings: Findings) -> str:
    """Paired differences as points with intervals around zero."""
    order = [name for name in findings.models if name in findings.paired]
    paired = {name: findings.paired[name] for name in (*order, *findings.paired)}
    if not paired:
        return ""
    low, high = min(0, *(p[1] for p in paired.values())), max(0, *(p[2] for p in paired.values()))
    width = max(high - low, 1e-9)

    def at(value: float) -> float:
        return 2 + 96 * (value - low) / width

    rows = []
    for name, (mean, left, right) in paired.items():
        verdict = "better" if right < 0 else "worse" if left > 0 else "undecided"
        track = (
            f'<i class="zero" style="left:{at(0):.1f}%"></i>'
            f'<i class="span" style="left:{at(left):.1f}%;width:{at(right) - at(left):.1f}%"></i>'
            f'<i class="mean" style="left:{at(mean):.1f}%"></i>'
        )
        rows.append(
            f'<div class="pair"><div>{shown_name(name)}</div><div class="track">{track}</div>'
            f"<div>{mean:+.4f} {verdict}<small>{left:+.4f} to {right:+.4f}</small></div></div>"
        )
    return (
        f'<div class="card"><h3>{shown_name(findings.main).capitalize()} minus each other model, record by record</h3>'
        '<p class="note">Mean NLL over the alignments on the same resampled records, 95% interval; left of the line, '
        f"{shown_name(findings.main)} is better.</p>{''.join(rows)}</div>"
    )


def share_table(findings: Findings, rows: Mapping[str, Mapping[str, float]], first_is_main: bool = False) -> str:
    """Shares of 1 as numbers over bars; names are HTML already."""
    body = []
    for i, (name, shares) in enumerate(rows.items()):
        cells = "".join(_share_cell(shares.get(a), css_colour(findings, a)) for a in findings.alignments)
        mean = f"<td>{mean_of(shares.values()):.1%}</td>" if shares else "<td></td>"
        main = " class=main" if first_is_main and i == 0 else ""
        body.append(f'<tr{main}><th scope="row">{name}</th>{cells}{mean}</tr>')
    return plain_table(_heads(findings), body, len(findings.alignments) + 1)


def _share_cell(share: float | None, colour: str) -> str:
    if share is None:
        return "<td></td>"
    fill = f"color-mix(in srgb,{colour} 26%,transparent)"
    rest = f"color-mix(in srgb,{colour} 5%,transparent)"
    return f'<td style="background:linear-gradient(90deg,{fill} {share:.1%},{rest} {share:.1%})">{share:.1%}</td>'


def confusion(findings: Findings) -> str:
    confusion = findings.router.get("confusion", {})
    rows = [a for a in findings.alignments if a in confusion]
    if not rows:
        return ""
    body = []
    for true in rows:
        total = max(sum(confusion[true].values()), 1)
        cells = []
        for predicted in rows:
            count = confusion[true].get(predicted, 0)
            tint = f"color-mix(in srgb,{css_colour(findings, predicted)} {60 * count / total:.0f}%,transparent)"
            cells.append(f'<td style="background:{tint}">{count:,}</td>')
        body.append(f'<tr><th scope="row">{dot(findings, true)}{escape(true)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(a)}</th>' for a in rows)
    right = sum(confusion[a].get(a, 0) for a in rows)
    total = sum(sum(row.values()) for row in confusion.values())
    return (
        f'<div class="card scroll"><h3>{right:,} of {total:,} records are placed right</h3><p class="note">Rows: what a record '
        f"is. Columns: what the routers take it for.</p>"
        + plain_table(f"<thead><tr><th></th>{heads}</tr></thead>", body, len(rows), "matrix")
        + "</div>"
    )


def figures(pictures: Mapping[str, Picture], *names: str) -> str:
    found = [pictures[name] for name in names if name in pictures]
    figures = "".join(
        f'<figure role="img" aria-label="{escape(p.title)}"><h3>{escape(p.title)}</h3><figcaption>{escape(p.note)}</figcaption>'
        f"{p.svg}</figure>\n"
        for p in found
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def bare_figure(pictures: Mapping[str, Picture], name: str) -> str:
    return figures(pictures, name).removeprefix('<div class="grid">').removesuffix("</div>")


def section(title: str, note: str, *parts: str) -> str:
    body = "".join(parts)
    return f'<section>\n<h2>{title}</h2>\n<p class="note">{note}</p>\n{body}</section>\n' if body else ""
