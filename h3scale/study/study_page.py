"""A study as one HTML page: what was found, then the pictures and tables behind it. No script, no links."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from h3scale.errors import OutputError
from h3scale.evaluation.findings import Findings
from h3scale.evaluation.report_colours import css_name
from h3scale.evaluation.report_style import style_sheet
from h3scale.evaluation.report_tables import dot, figures, forest, plain_table, section, shown_name
from h3scale.study.study_plots import COLOURS, NAMES, best_of_groups, draw_study
from h3scale.study.study_table import answer_mark, gain, legend
from h3scale.study.tasks import GROUPS

Results = Mapping[str, Any]
TOLD = ("mean NLL", "over the seeds", "says", "balance", "over the seeds", "says")
SHEET = (
    ".wide{overflow-x:auto}.wide table{font-size:14px}.wide :is(td,thead th){padding:6px}"
    ".wide thead th{white-space:normal;min-width:76px;vertical-align:bottom}td.good{--tint:#1a9a72}td.bad{--tint:#d4622a}"
    ".dots{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--muted);margin:0 0 12px}"
)


def write_page(results: Results, path: Path) -> None:
    """The page as a file. OutputError (73) when it cannot be written."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(page(results), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: the page cannot be written ({error.strerror})") from error


def page(results: Results) -> str:
    """The whole page; light and dark, readable on a phone."""
    pictures = draw_study(results)
    parts = (
        _header(results),
        section("Who is balanced", _key(), figures(pictures, "parallel", "pareto"), _gains(results)),
        section("Is the difference real", _intervals_note(results), _forests(results), _seeds(results), _comparisons(results)),
        section(
            "What aligning one does to the others",
            "Collaboration and conflict between the alignments.",
            _conflict(results),
            _pairs(results),
        ),
        section("Every number", "NLL per response token on held-out records, and what each model cost.", _numbers(results)),
        section("Other scores", "Of the same suite, by likelihood alone; higher is better.", _others(results)),
        "<footer>" + "".join(f"<p>{escape(line)}</p>" for line in [*legend(results), *results["notes"]]) + "</footer>\n",
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>h3scale: study</title>\n'
        f"<style>{style_sheet()}{SHEET}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def headline(results: Results) -> str:
    """What both intervals let one say of the main model."""
    verdicts = [model["paired"]["verdict"] for model in results["models"].values() if "paired" in model]
    counts = {word: verdicts.count(word) for word in ("better", "worse", "undecided")}
    told = f"{results['main'].replace('_', ' ').capitalize()} is better than {counts['better']} of {len(verdicts)} models"
    worse = [f"worse than {counts['worse']}"] if counts["worse"] else []
    return ", ".join([told, *worse, *([f"{counts['undecided']} undecided"] if counts["undecided"] else [])])


def _header(results: Results) -> str:
    models = results["models"]
    tiles = []
    for group, name in best_of_groups(results).items():
        value = models[name]["balance"]["mean"]
        what = "balance of" if value is not None else "mean NLL of"
        shown = gain(value) if value is not None else f"{models[name]['mean_nll']['mean']:.3f}"
        tiles.append(f'<div class="tile"><b>{shown}</b><span>{what} {shown_name(name)}<br>{escape(NAMES[group])}</span></div>')
    seeds = len(results["seeds"])
    counted = f"{seeds} seeds" if seeds > 1 else "one seed, so nothing is said of other seeds"
    what = f"{len(models)} models of one base on suite {escape(results['suite'])}"
    lead = f"{what}; {counted}. Balance is the least gain of all alignments."
    return (
        f'<header>\n<p class="eyebrow">h3scale study</p>\n<h1>{escape(headline(results))}</h1>\n<p class="lead">{lead}</p>\n'
        f'<div class="tiles">{"".join(tiles)}</div>\n</header>\n'
    )


def _key() -> str:
    marks = "".join(
        f'<span><i class="dot" style="background:var({css_name(COLOURS[g])})"></i>{escape(NAMES[g])}</span>' for g in GROUPS
    )
    return f'0 is the base, 1 the best aligned model of that alignment.</p><p class="dots">{marks}'


def _mark(results: Results, name: str) -> str:
    colour = css_name(COLOURS[results["models"][name]["group"]])
    kind = escape(NAMES[results["models"][name]["group"]])
    return f'<i class="dot" role="img" aria-label="{kind}" title="{kind}" style="background:var({colour})"></i>{shown_name(name)}'


def _table(results: Results, heads: Sequence[str], rows: Mapping[str, Sequence[str]], title: str) -> str:
    """Rows by model, cells as HTML `td`."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = [
        f'<tr{" class=main" if name == results["main"] else ""}><th scope="row">{_mark(results, name)}</th>{"".join(cells)}</tr>'
        for name, cells in rows.items()
    ]
    table = plain_table(f"<thead><tr><th></th>{head}</tr></thead>", body, len(heads))
    return f'<div class="card wide"><h3>{escape(title)}</h3>{table}</div>'


def _by_nll(results: Results) -> list[str]:
    return sorted(results["models"], key=lambda name: float(results["models"][name]["mean_nll"]["mean"]))


def _gains(results: Results) -> str:
    heads = [*(f"{dot(_colours(results), a)}{escape(a)}" for a in results["alignments"]), "mean", "balance"]
    rows = {}
    for name in _by_nll(results):
        model = results["models"][name]
        numbers = [*(model["gain"][a] for a in results["alignments"]), model["mean_gain"], model["balance"]]
        rows[name] = [_tinted(number["mean"], 1.0, gain(number["mean"]), _small(number, 2)) for number in numbers]
    return _table(results, heads, rows, "Gains, the lowest mean NLL first")


def _forests(results: Results) -> str:
    main, models = results["main"], results["models"]
    paired = {name: models[name]["paired"]["mean_nll"] for name in _by_nll(results) if name != main}
    return forest(
        Findings({"paired": {f"{main} - {name}": number for name, number in paired.items()}}, {}, {}, results["alignments"], main)
    )


def _intervals_note(results: Results) -> str:
    many = len(results["seeds"]) > 1
    words = "The words beside the bars go by the records alone, those of the table by the seeds too. " if many else ""
    return f"{words}Of differences that are none, one in twenty looks like one."


def _seeds(results: Results) -> str:
    if len(results["seeds"]) < 2:
        return ""
    rows = {}
    for name in _by_nll(results):
        paired = results["models"][name].get("paired")
        if paired:
            each = [f"<td>{paired['by_seed'][str(seed)]:+.4f}</td>" for seed in results["seeds"]]
            rows[name] = [*each, *_told(paired)]
    heads = [*(f"seed {seed}" for seed in results["seeds"]), *TOLD]
    return _table(results, heads, rows, f"{results['main'].replace('_', ' ').capitalize()} minus each, seed by seed: mean NLL")


def _told(paired: Mapping[str, Any]) -> list[str]:
    """Cells of a difference in mean NLL and in balance."""
    numbers = [("mean_nll", 4), ("over_seeds", 4), ("balance", 2), ("balance_over_seeds", 2)]
    cells = [
        "<td>none</td>"
        if paired[key]["mean"] is None
        else f"<td>{paired[key]['mean']:+.{digits}f}{_small(paired[key], digits, '+')}</td>"
        for key, digits in numbers
    ]
    return [*cells[:2], f"<td>{paired['verdict']}</td>", *cells[2:], f"<td>{paired['balance_verdict']}</td>"]


def _comparisons(results: Results) -> str:
    """The pairs that the recipe asks about."""
    body = []
    for pair in results["comparisons"]:
        names = f"{shown_name(pair['one'])} less {shown_name(pair['other'])}"
        body.append(f'<tr><th scope="row">{names}</th>{"".join(_told(pair))}</tr>')
    if not body:
        return ""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in TOLD)
    table = plain_table(f"<thead><tr><th></th>{head}</tr></thead>", body, len(TOLD))
    return f'<div class="card wide"><h3>What else was asked, two by two</h3>{table}</div>'


def _conflict(results: Results) -> str:
    table = results["conflict"]["nll"]
    largest = max(abs(cell["mean"]) for row in table.values() for cell in row.values())
    rows = {
        aligned: [_tinted(-cell["mean"], largest, f"{cell['mean']:+.4f}", _small(cell, 4, "+")) for cell in row.values()]
        for aligned, row in table.items()
    }
    heads = [f"on {dot(_colours(results), a)}{escape(a)}" for a in results["alignments"]]
    return _table(results, heads, rows, "NLL of each aligned model less the base's: below 0 it helps, above 0 it harms")


def _pairs(results: Results) -> str:
    pairs = results["conflict"]["pairs"]
    if not pairs:
        return ""
    columns = {
        "cosine": "cosine",
        "sign_conflict": "signs that differ",
        "overlap": "directions in common",
        "overlap_by_chance": "by chance",
    }
    head = "".join(f'<th scope="col">{text}</th>' for text in columns.values())
    body = []
    for pair in pairs:
        cells = "".join("<td></td>" if pair[key] is None else f"<td>{pair[key]:.3f}</td>" for key in columns)
        body.append(f'<tr><th scope="row">{escape(" and ".join(pair["models"]))}</th>{cells}</tr>')
    table = plain_table(f"<thead><tr><th></th>{head}</tr></thead>", body, len(columns))
    return f'<div class="card wide"><h3>The changes of their weights, two by two (h3scale merge --explain)</h3>{table}</div>'


def _numbers(results: Results) -> str:
    rows = {}
    for name, model in results["models"].items():
        cells = [f"<td>{model['nll'][a]['mean']:.4f}{_small(model['nll'][a], 4)}</td>" for a in results["alignments"]]
        cells.append(f"<td>{model['mean_nll']['mean']:.4f}</td>")
        cells.append(
            f"<td>{model['parameters']['total'] / 1e6:.2f}<small>{model['parameters']['active'] / 1e6:.2f} active</small></td>"
        )
        cells.append(f"<td>{model['tokens'] / 1e6:.2f}<small>{'as many' if model['same_tokens'] else 'other'}</small></td>")
        cells += [f"<td>{'' if model[key] is None else format(model[key], '.0f')}</td>" for key in ("train_s", "make_s")]
        rows[name] = cells
    heads = [*(escape(a) for a in results["alignments"]), "mean", "M parameters", "M tokens", "training, s", "making, s"]
    return _table(results, heads, rows, "NLL and cost")


def _others(results: Results) -> str:
    models = results["models"]
    first = next(iter(models.values()))["scores"]
    if not first:
        return ""
    rows = {}
    for name, model in models.items():
        rows[name] = [
            f"<td>{score['mean']:.3f}{answer_mark(model, score)}{_small(score, 3)}{_seeds_of(score)}</td>"
            for score in model["scores"]
        ]
    heads = [escape(f"{score['task']}: {score['metric']}".replace("_", " ")) for score in first]
    return _table(results, heads, rows, "Scores of answers")


def _seeds_of(score: Mapping[str, Any]) -> str:
    seeds = score["over_seeds"]
    return "" if seeds["low"] is None else f"<small>seeds: {seeds['low']:.3f} to {seeds['high']:.3f}</small>"


def _tinted(value: float | None, most: float, text: str, small: str) -> str:
    """Green above 0 and orange below, as strong as the share of `most`."""
    if value is None:
        return f"<td>{text}</td>"
    share = min(abs(value) / (most or 1.0), 1.0)
    name = "good" if value >= 0 else "bad"
    return (
        f'<td class="{name}" style="background:color-mix(in srgb,var(--tint) {4 + 34 * share:.0f}%,transparent)">{text}{small}</td>'
    )


def _small(number: Mapping[str, float | None], digits: int, sign: str = "") -> str:
    if number["low"] is None:
        return ""
    return f"<small>{number['low']:{sign}.{digits}f} to {number['high']:{sign}.{digits}f}</small>"


def _colours(results: Results) -> Findings:
    return Findings({}, {}, {}, results["alignments"], results["main"])
