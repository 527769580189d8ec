"""The report as one HTML page: what was found first, then the tables and pictures behind it. No script, no links."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from h3scale.evaluation.findings import Findings
from h3scale.evaluation.report_plots import Picture
from h3scale.evaluation.report_scores import scores_headline, scores_lead, scores_notes, scores_section
from h3scale.evaluation.report_style import style_sheet
from h3scale.evaluation.report_tables import (
    bare_figure,
    confusion,
    css_colour,
    dot,
    figures,
    forest,
    heat_table,
    mean_of,
    section,
    share_table,
    shown_name,
)

SAMPLES_SHOWN = 3  # an alignment
NLL = (
    "NLL: sum over an alignment's records divided by its response tokens, end token included. Intervals: 2,000 bootstrap "
    "resamples of records, those of one prompt together, percentiles, wider for few records; differences resample both "
    "models together."
)
PLACED = (
    "A record is placed right when the alignment with the highest sum of the routers' log-probabilities, over all layers "
    "and response tokens, is its own; general experts have no vote."
)


def render_page(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    """The whole page. Sections without data are not there."""
    sections = (
        _header(findings),
        _answers(findings),
        scores_section(findings, pictures),
        _routing(findings, pictures),
        _training(findings, pictures),
        _ablations(findings),
        _without(findings),
        _samples(findings),
        _footer(findings),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>h3scale: {shown_name(findings.main)}</title>\n<style>{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _header(findings: Findings) -> str:
    tiles = []
    models, main = findings.models, findings.main
    if main in models:
        tiles.append((f"{findings.mean_nll(main):.3f}", f"mean NLL of {shown_name(main)}, nats per response token"))
        rivals = [name for name in models if name not in (main, "fused_init")]
        if rivals:
            best = min(rivals, key=findings.mean_nll)
            tiles.append((f"{findings.mean_nll(best):.3f}", f"the best of the others: {shown_name(best)}"))
    accuracy = findings.router.get("accuracy", {})
    if accuracy:
        tiles.append((f"{mean_of(accuracy.values()):.1%}", "held-out records that the routers place right"))
    exact = _exact_match(findings).get(main, {})
    if exact:
        tiles.append((f"{mean_of(cell['exact'] for cell in exact.values()):.1%}", "generated answers that are exactly right"))
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in tiles)
    shown = f'<div class="tiles">{shown}</div>\n' if shown else ""
    of_suite = findings.suites and not models
    headline, lead = (scores_headline, scores_lead) if of_suite else (_headline, _lead)
    return (
        f'<header>\n<p class="eyebrow">h3scale report</p>\n<h1>{headline(findings)}</h1>\n'
        f'<p class="lead">{lead(findings)}</p>\n{shown}</header>\n'
    )


def _headline(findings: Findings) -> str:
    """What the numbers say of the main model, good or bad; a difference whose interval holds 0 is no difference."""
    models, main = findings.models, findings.main
    rivals = [name for name in models if name not in (main, "fused_init")]
    if main not in models or not rivals:
        return f"{shown_name(main).capitalize()}: what it knows"
    main_name = shown_name(main).capitalize()
    gap = {name: findings.mean_nll(main) - findings.mean_nll(name) for name in rivals}
    intervals = {name: findings.paired.get(name, (gap[name],) * 3) for name in rivals}
    ahead = [name for name, (_, _, high) in intervals.items() if high < 0]
    level = [escape(shown_name(name)) for name, (_, low, high) in intervals.items() if low <= 0 <= high]
    if len(ahead) == len(rivals):
        return f"{main_name} knows the answers best, of {len(rivals) + 1} models"
    headline = f"{main_name} knows the answers better than {len(ahead)} of {len(rivals)} other models"
    return headline + (f", level with {' and '.join(level)}" if level else "")


def _lead(findings: Findings) -> str:
    models, main = findings.models, findings.main
    entry = models.get(main, {})
    records = sum(cell.get("records", 0) for cell in entry.values())
    kinds = ", ".join(escape(alignment) for alignment in findings.alignments)
    measured = f"Measured on {records:,} held-out records: {kinds}."
    best = [a for a in entry if all(entry[a]["nll"] <= other[a]["nll"] for other in models.values() if a in other)]
    if len(models) < 2:
        return measured
    if not best:
        return f"{measured} Kind by kind, another model is always better."
    return f"{measured} Kind by kind, it is the best on {', '.join(escape(a) for a in findings.alignments if a in best)}."


def _answers(findings: Findings) -> str:
    if not findings.models:
        return ""
    rows = [(name, name == findings.main, model) for name, model in findings.models.items()]
    parts = [f'<div class="card scroll">{heat_table(findings, rows)}</div>', forest(findings)]
    exact = {
        shown_name(name): {a: cell["exact"] for a, cell in table.items()} for name, table in _exact_match(findings).items() if table
    }
    if exact:
        table = share_table(findings, exact)
        parts.append(f'<div class="card scroll"><h3>Generated answers that match exactly</h3>{table}</div>')
    return section(
        "Who knows the answers",
        "Negative log-likelihood per response token on held-out records, in nats; lower is better. Small: 95% bootstrap "
        "interval. Strong colour and a frame: best of its column.",
        *parts,
    )


def _exact_match(findings: Findings) -> dict[str, Any]:
    found: dict[str, Any] = findings.results.get("exact_match") or {
        name: evaluation["exact_match"] for name, evaluation in findings.evaluations.items() if "exact_match" in evaluation
    }
    if not any(cell["exact"] for table in found.values() for cell in table.values()):
        return {}  # open questions have no one right answer: a column of zeros says nothing
    return {name: found[name] for name in (*findings.models, *found) if name in found}


def _routing(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    router = findings.router
    rows = {
        "routers, by record<small>votes of all layers and response tokens</small>": router.get("accuracy"),
        "bag of words, by record<small>a classifier of words alone</small>": router.get(
            "bag_of_words", findings.evaluation.get("bag", {}).get("accuracy")
        ),
        "routers before training, by record": router.get("before_training"),
        "routers, by response token": router.get("per_token", {}).get("accuracy"),
        "routers, at the last prompt token<small>before any answer is seen</small>": router.get("last_prompt_token", {}).get(
            "accuracy"
        ),
    }
    shown = {name: shares for name, shares in rows.items() if shares}
    table = f'<div class="card scroll">{share_table(findings, shown, first_is_main=True)}</div>' if shown else ""
    matrix = confusion(findings)
    return section(
        "Who answers",
        "Whether the routers see which kind of record they have, and which experts they take. Held-out records.",
        table,
        figures(pictures, "expert_load", "router_accuracy"),
        f'<div class="grid">{matrix}{bare_figure(pictures, "router_by_layer")}</div>' if matrix else "",
    )


def _training(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    return section(
        "How it learned",
        "Figures of the training steps themselves, from each run's metrics.",
        figures(pictures, "lm_loss", "router_loss", "drift", "base_loss", "aligned_losses"),
    )


def _ablations(findings: Findings) -> str:
    """The main model with one thing changed; an entry is {"nll", "router"} or NLL by alignment alone."""
    entries = findings.results.get("ablations", {})
    if not entries:
        return ""
    nll = {name: entry.get("nll", entry) for name, entry in entries.items()}
    rows = [(name, False, table) for name, table in nll.items() if table]
    if findings.main in findings.models:
        rows.insert(0, (findings.main, True, findings.models[findings.main]))
    accuracy = {findings.main: findings.router.get("accuracy", {})}
    accuracy.update({name: entry.get("router", {}).get("accuracy", {}) for name, entry in entries.items()})
    shares = {shown_name(name): shown for name, shown in accuracy.items() if shown}
    parts = [f'<div class="card scroll">{heat_table(findings, rows)}</div>']
    if shares:
        table = share_table(findings, shares, first_is_main=True)
        parts.append(f'<div class="card scroll"><h3>Records that the routers place right</h3>{table}</div>')
    return section("What each part is worth", "The same model with one thing changed; NLL per response token.", *parts)


def _without(findings: Findings) -> str:
    parts = []
    for text, entry in findings.results.get("without", {}).items():
        models = entry.get("models", {})
        rows = [(name, name == findings.main, models[name]) for name in findings.models if models.get(name)]
        if rows:
            parts.append(
                f'<div class="card scroll"><h3>Without records whose source says “{escape(text)}”</h3>'
                f"{heat_table(findings, rows)}</div>"
            )
    return section("On fewer records", "The same scores with some sources left out; NLL per response token.", *parts)


def _samples(findings: Findings) -> str:
    samples = findings.evaluation.get("samples", [])
    cards = []
    for alignment in findings.alignments:
        own = [sample for sample in samples if sample["alignment"] == alignment]
        cards += [_sample(findings, sample) for sample in own[:SAMPLES_SHOWN]]
    grid = f'<div class="grid">{"".join(cards)}</div>' if cards else ""
    return section(
        "In its own words",
        f"Greedy answers of {shown_name(findings.main)} to held-out prompts, and the experts' shares of the routing weight.",
        grid,
    )


def _sample(findings: Findings, sample: Mapping[str, Any]) -> str:
    alignment = sample["alignment"]
    verdict = "<span>✓ exact</span>" if sample["exact"] else '<span class="no">differs</span>'
    fields = [("Prompt", sample["prompt"]), ("Answer", sample["answer"] or "(empty)")]
    if not sample["exact"]:
        fields.append(("Expected", sample["expected"]))
    texts = "".join(f"<div><dt>{term}</dt><dd>{escape(text)}</dd></div>" for term, text in fields)
    return (
        f'<div class="card sample" style="--accent:{css_colour(findings, alignment)}"><div class="top">'
        f"<span>{escape(alignment)}</span>{verdict}</div><dl>{texts}{_experts(findings, sample)}</dl></div>\n"
    )


def _experts(findings: Findings, sample: Mapping[str, Any]) -> str:
    shares = [share for share in sample.get("experts", []) if share["weight"] > 0]
    if not shares:
        return ""
    bars = "".join(
        f'<i style="width:{share["weight"]:.1%};background:{css_colour(findings, share["alignment"])}"></i>' for share in shares
    )
    keys = "".join(
        f"<span>{dot(findings, share['alignment'])}{escape(share['expert'])} {share['weight']:.0%}</span>" for share in shares
    )
    return f'<div><dt>Experts</dt><dd><div class="mix">{bars}</div><div class="keys">{keys}</div></dd></div>'


def _footer(findings: Findings) -> str:
    told = [NLL] * bool(findings.models) + [PLACED] * bool(findings.router)
    lines = [*told, *map(escape, findings.evaluation.get("notes", [])), *scores_notes(findings)]
    return "<footer>" + "".join(f"<p>{line}</p>" for line in lines) + "</footer>\n" if lines else ""
