"""The h3scale command. Verbs import what they need when they run, so that --help answers at once."""

import sys
import traceback

import typer

from h3scale import __version__, log
from h3scale.cli import checkpoint, data, demo, evaluate, fuse, generate, launch, merge, report, study, train
from h3scale.errors import H3Error

app = typer.Typer(
    name="h3scale",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One model of a helpful, a harmless and an honest one: align, fuse or merge, train, release.",
)
app.command()(demo.demo)
app.add_typer(data.app, name="data")
app.command()(train.train)
app.command()(train.align)
app.command()(launch.launch)
app.command()(fuse.fuse)
app.command()(merge.merge)
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(evaluate.evaluate)
app.command()(generate.generate)
app.command()(report.report)
app.command()(study.study)

_debug = False


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and more messages."),
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    global _debug
    _debug = debug
    log.setup(verbose=debug)


def main() -> None:
    """Runs the command; errors become one line a finding and the exit code of h3scale.errors."""
    try:
        app(standalone_mode=True)
    except H3Error as error:
        if _debug:
            traceback.print_exc()
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if _debug:
            traceback.print_exc()
        print(f"error: {error.filename or 'storage'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(74)
    except Exception:  # our bug: the traceback, and the exit code that says so
        traceback.print_exc()
        sys.exit(70)


if __name__ == "__main__":
    main()
