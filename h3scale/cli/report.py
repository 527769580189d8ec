"""h3scale report."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Argument(help="A folder with evaluation/ or results.json, such as a demo's.", show_default=False)]


def report(out: Out) -> None:
    """Make OUT/report.html and OUT/plots/*.png from OUT/evaluation/*.json, of records or a suite; of a demo OUT/results.json too.

    A study has a page already, study.html.

    Example: h3scale report demo-out
    """
    from h3scale.errors import UsageError
    from h3scale.evaluation.report import report as write_report
    from h3scale.study.demo_results import assemble, can_assemble
    from h3scale.study.run import MARKER

    if (out / MARKER).is_file():
        raise UsageError(f"{out}: is a study: open study.html there")
    if can_assemble(out):
        assemble(out)
    page = write_report(out)
    print(f"report: {page}   pictures: {out / 'plots'}/   next: open the page in a browser")
