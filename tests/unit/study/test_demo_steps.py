"""A row of commands: printed, run once, stopped at the first failure with its exit code."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from h3scale.errors import H3Error
from h3scale.study.demo_steps import Runner, Step


def runner(folder: Path) -> tuple[Runner, io.StringIO]:
    said = io.StringIO()
    return Runner(folder, Console(file=said, width=200, highlight=False)), said


def touch(name: str) -> Step:
    return Step(f"make {name}", ["python", "-c", f"open('{name}', 'a').write('x')"], name)


def test_commands_are_printed_and_a_result_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    run, said = runner(tmp_path)
    run.run([touch("a"), touch("b")])
    (tmp_path / "b").unlink()
    run.run([touch("a"), touch("b")])
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "x"
    assert "there already: a" in said.getvalue()
    assert "$ python -c" in said.getvalue()


def test_the_first_failure_stops_with_its_exit_code(tmp_path: Path) -> None:
    run, _ = runner(tmp_path)
    with pytest.raises(H3Error, match="step 2 ended with exit code 65") as caught:
        run.run([touch("a"), Step("fail", ["python", "-c", "raise SystemExit(65)"]), touch("b")])
    assert caught.value.exit_code == 65
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
