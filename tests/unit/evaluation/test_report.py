"""The report says what results.json says, in one file that needs nothing else, for any number of alignments."""

import json
import re
from html import unescape

import pytest

from h3scale.checkpoint.shards import write_json
from h3scale.errors import MissingInputError
from h3scale.evaluation.findings import read_findings
from h3scale.evaluation.report import report
from h3scale.evaluation.report_colours import colour_of
from h3scale.evaluation.report_page import render_page
from h3scale.evaluation.report_plots import _apart, _curve

from .fake import fake_out

SETS = {
    "two": ("left", "right"),
    "three": ("helpful", "harmless", "honest"),
    "five": ("helpful", "harmless", "honest", "curious", "terse"),
}
PLOTS = {"lm_loss", "base_loss", "aligned_losses", "router_loss", "drift"}
PLOTS |= {"router_accuracy", "router_by_layer", "expert_load", "models_by_alignment"}


def page_of(out):
    """The page without its pictures, which take seconds."""
    return render_page(read_findings(out), {})


@pytest.fixture(scope="module", params=SETS)
def made(request, tmp_path_factory):
    out = fake_out(tmp_path_factory.mktemp(request.param), SETS[request.param], steps=60)
    return out, report(out).read_text(encoding="utf-8"), SETS[request.param]


def test_the_page_needs_nothing_else(made):
    _, page, _ = made
    for outside in ("http", "<script", "<link", "@import", "src=", "file:", "//"):
        assert outside not in page, outside
    assert not [link for link in re.findall(r'href="([^"]*)"', page) if not link.startswith("#")]
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page


def test_the_page_shows_every_number(made):
    out, page, alignments = made
    results = json.loads((out / "results.json").read_text())
    tables = [*results["models"].values(), *(entry["nll"] for entry in results["ablations"].values())]
    for table in tables:
        for entry in table.values():
            assert f">{entry['nll']:.3f}<small>{entry['low']:.3f} to {entry['high']:.3f}</small>" in page
        assert f">{sum(e['nll'] for e in table.values()) / len(table):.3f}</td>" in page
    shares = [results["router"][key] for key in ("accuracy", "bag_of_words", "before_training")]
    shares += [entry["router"]["accuracy"] for entry in results["ablations"].values()]
    for share in (value for row in shares for value in row.values()):
        assert f">{share:.1%}</td>" in page
    for entry in results["paired"].values():
        assert f"{entry['difference']:+.4f} better<small>{entry['low']:+.4f} to {entry['high']:+.4f}" in page
    evaluation = json.loads((out / "evaluation" / "fused.json").read_text())
    for a in alignments:
        assert f">{evaluation['router']['confusion'][a][a]:,}</td>" in page
    for sample in evaluation["samples"]:
        assert sample["prompt"] in unescape(page)
        assert sample["answer"] in unescape(page)


def test_the_best_of_each_column_is_marked_and_no_other(made):
    out, page, alignments = made
    models = json.loads((out / "results.json").read_text())["models"]
    first_table = page[page.index("<tbody>") : page.index("</tbody>")]
    marked = re.findall(r'<td class="best"[^>]*>([\d.]+)', first_table)
    best = [f"{min(model[a]['nll'] for model in models.values()):.3f}" for a in alignments]
    means = [sum(e["nll"] for e in model.values()) / len(model) for model in models.values()]
    assert sorted(marked) == sorted([*best, f"{min(means):.3f}"])


def test_pictures_are_there_as_png_and_in_the_page(made):
    out, page, _ = made
    assert {path.stem for path in (out / "plots").iterdir()} == PLOTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "plots").iterdir())
    assert page.count("<svg") == len(PLOTS) - 1  # the table is text in the page
    assert not re.search(r"(fill|stroke): #(2f6fd6|d4622a|1a9a72|1b2330|ffffff)", page)  # all by variable, for the dark theme
    defined = set(re.findall(r"(--c\w{6}):", page))
    assert set(re.findall(r"var\((--c\w{6})\)", page)) <= defined


def test_texts_of_records_cannot_become_markup(tmp_path):
    out = fake_out(tmp_path / "out", steps=5)
    path = out / "evaluation" / "fused.json"
    evaluation = json.loads(path.read_text())
    evaluation["samples"][0]["answer"] = '</dd><script>alert("x")</script>'
    write_json(path, evaluation)
    assert "<script" not in page_of(out)


def test_the_same_inputs_give_the_same_page(tmp_path):
    pages = [report(fake_out(tmp_path / name, steps=20)).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_the_headline_does_not_flatter(tmp_path):
    out = fake_out(tmp_path / "out", steps=5)
    results = json.loads((out / "results.json").read_text())
    assert "Fused knows the answers best, of 6 models" in page_of(out)
    results["models"]["mixture"] = {a: {**e, "nll": 0.1} for a, e in results["models"]["mixture"].items()}
    results["paired"]["fused - mixture"] = {"difference": 0.4, "low": 0.3, "high": 0.5}
    results["paired"]["fused - base"] = {"difference": -0.1, "low": -0.3, "high": 0.1}
    write_json(out / "results.json", results)
    page = page_of(out)
    assert "Fused knows the answers better than 3 of 5 other models, level with base" in page
    assert "another model is always better" in page
    assert "+0.4000 worse" in page
    assert "-0.1000 undecided" in page


def test_results_alone_are_enough(tmp_path):
    nll = {"helpful": {"nll": 1.25, "low": 1.0, "high": 1.5, "records": 7}}
    write_json(tmp_path / "results.json", {"models": {"base": nll}, "router": {}, "ablations": {}})
    page = report(tmp_path).read_text()
    assert ">1.250<small>1.000 to 1.500</small>" in page
    assert "How it learned" not in page
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"models_by_alignment"}


def test_metrics_of_a_resumed_and_cut_run(tmp_path):
    out = fake_out(tmp_path / "out", steps=5)
    path = out / "checkpoints" / "fused" / "metrics.jsonl"
    again = json.dumps({"step": 4, "lm": 9.5}) + "\n" + json.dumps({"step": 6, "lm": float("nan")}) + '\n{"step": 7, "l'
    path.write_text(path.read_text() + again)
    lines = read_findings(out).runs["fused"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3]["lm"] == 9.5
    assert "lm" not in lines[5]


def test_held_out_figures_join_their_step_and_leave_the_pictures_as_they_are(tmp_path):
    out = fake_out(tmp_path / "out", steps=5)
    path = out / "checkpoints" / "fused" / "metrics.jsonl"
    before = read_findings(out).runs["fused"]
    held_out = [{"step": step, "heldout/lm": 2.0 + step} for step in (0, 4)]
    path.write_text(json.dumps(held_out[0]) + "\n" + path.read_text() + json.dumps(held_out[1]) + "\n")
    lines = read_findings(out).runs["fused"]
    assert lines == [held_out[0], *before[:3], before[3] | held_out[1], *before[4:]]
    assert report(out).is_file()


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "other.json", {"x": 1})
    with pytest.raises(MissingInputError, match=r"no results\.json and no evaluation/\*\.json of h3scale evaluate \(works: "):
        report(tmp_path)
    with pytest.raises(MissingInputError, match="no such folder"):
        report(tmp_path / "nowhere")


def test_long_runs_are_averaged_and_labels_kept_apart():
    steps, values = _curve([{"step": i, "lm": float(i)} for i in range(1, 601)], "lm")
    assert len(steps) == 150
    assert (steps[0], values[0]) == (4, 2.5)
    assert (steps[-1], values[-1]) == (600, 598.5)
    places = _apart([0.1, 0.98, 0.99, 1.0], 0.1, 1.03)
    assert places == pytest.approx([0.1, 0.83, 0.93, 1.03])


def test_models_are_in_the_order_of_the_way(made):
    out, page, alignments = made
    order = ["base", *alignments, "mixture", "fused_init", "fused"]
    assert list(read_findings(out).models) == order
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    shown = re.findall(r'<th scope="row">([^<]*)', table)
    assert shown == ["base", *alignments, "mixture (control)", "fused, before training", "fused"]


def test_every_alignment_has_a_colour_of_its_own():
    alignments = [*SETS["five"], "x", "y", "z"]
    assert len({colour_of(a, alignments) for a in alignments} | {colour_of(None, alignments)}) == len(alignments) + 1
