"""OUT/report.html and OUT/plots from what `h3scale evaluate`, or a demo, has measured."""

from pathlib import Path

from h3scale.errors import OutputError
from h3scale.evaluation.findings import read_findings
from h3scale.evaluation.report_page import render_page
from h3scale.evaluation.report_plots import draw


def report(out: Path) -> Path:
    """Writes out/report.html and out/plots/*.png from out/results.json, out/evaluation/*.json and the runs' metrics.jsonl.

    The page is one file without scripts and without links to anywhere. What was not measured is left out of it. Gives
    the page's path. Raises MissingInputError (66) without either of the first two, OutputError (73) when out cannot be written.
    """
    findings = read_findings(out)
    try:
        (out / "plots").mkdir(exist_ok=True)
        figures = draw(findings, out / "plots")
        page = out / "report.html"
        partial = out / ".partial-report.html"
        partial.write_text(render_page(findings, figures), encoding="utf-8")
        partial.replace(page)
    except OSError as error:
        raise OutputError(f"{out}: the report cannot be written ({error.strerror})") from error
    return page
