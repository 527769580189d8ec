"""h3scale report."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Argument(help="A folder with evaluation/ or results.json, such as a demo's.", show_default=False)]


def report(out: Out) -> None:
    """Make OUT/report.html, OUT/plots/*.png and, from OUT/evaluation, OUT/results.json.

    Example: h3scale report demo-out
    """
    from h3scale.evaluation.report import report as write_report
    from h3scale.study.demo_results import assemble

    if (out / "evaluation" / "fused.json").is_file():
        assemble(out)
    page = write_report(out)
    print(f"report: {page}   pictures: {out / 'plots'}/   next: open the page in a browser")
