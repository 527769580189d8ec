"""h3scale demo."""

from pathlib import Path
from typing import Annotated

import typer

RANKS = (1, 2, 4)  # divisors of the number of experts and of the rows of a batch
MARKER = ".h3scale-demo"  # what the folder was made with; only a folder that has it is ever deleted


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder with helpful.jsonl, harmless.jsonl, honest.jsonl; without it, built-in records.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo-out"),
    ranks: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything: proves the way, not the numbers.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out where an earlier demo stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete --out first.")] = False,
) -> None:
    """The whole way on this machine: data, base, three aligned models, fusion, training, release, report.

    Every step is an ordinary command that is printed before it runs, so the demo is also the tutorial.

    Example: h3scale demo --out demo-out
    """
    import shutil

    from h3scale.errors import ConfigError, MissingInputError, OutputError, UnsafeError, UsageError
    from h3scale.study.demo import ALIGNMENTS, Demo
    from h3scale.study.demo_results import show
    from h3scale.study.demo_steps import Runner

    if data and quick:
        raise UsageError("--quick uses the built-in records (works: --quick, or --data DIR)")
    if data:
        missing = [f"{data / f'{name}.jsonl'}: no such file" for name in ALIGNMENTS if not (data / f"{name}.jsonl").is_file()]
        if missing:
            raise MissingInputError(missing)
    if ranks not in RANKS:
        raise ConfigError(f"--ranks: {ranks} processes cannot share the demo's four experts and rows (works: 1, 2, 4)")
    marker, chosen = out / MARKER, f"data={data and data.resolve()} ranks={ranks} quick={quick}\n"
    if out.is_dir() and any(out.iterdir()):
        if not (resume or force):
            raise OutputError(f"{out}: exists already (--resume to go on there, --force to delete it first, --out for another)")
        if not marker.is_file():
            raise UnsafeError(f"{out}: not made by h3scale demo, so neither --resume nor --force touches it (works: another --out)")
        if resume and marker.read_text() != chosen:
            raise ConfigError(f"{out}: was made with {marker.read_text().strip()} (works: --resume with the same, or --force)")
        if force and not resume:
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(chosen)
    runner = Runner(out.resolve())
    runner.run(Demo(data, ranks, quick).steps())
    show(out, runner.console)
