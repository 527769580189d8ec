"""What libraries say goes to a file; what h3scale says, and errors, reach the terminal as well."""

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import pytest

from h3scale import log
from h3scale.errors import DataError


class Terminal(contextlib.redirect_stderr[io.StringIO]):
    """A stderr that h3scale logs to. (pytest replaces sys.stderr between fixture and test, so this is no fixture.)"""

    def __enter__(self) -> io.StringIO:
        self.state = log.logger.handlers[:], log.logger.propagate, log.logger.level
        log.setup()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        log.logger.handlers[:], log.logger.propagate = self.state[:2]
        log.logger.setLevel(self.state[2])
        super().__exit__(*exc)  # type: ignore[arg-type]


def fail(text: str, error: Exception, path: Path | None = None) -> None:
    """A library says `text`, then the run fails."""
    with log.libraries_to_file() as file:
        print(text)
        if path:
            file.open(path)
        raise error


@pytest.mark.parametrize("keeps_to_itself", [True, False])
def test_noise_is_in_the_file_only_and_our_messages_and_errors_are_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_to_itself: bool
) -> None:
    library = logging.getLogger("tests.library")
    monkeypatch.setattr(library, "propagate", not keeps_to_itself)
    monkeypatch.setattr(log, "LIBRARIES", ("tests.library",))
    with Terminal(io.StringIO()) as stderr:
        monkeypatch.setattr(library, "handlers", [logging.StreamHandler(stderr)] if keeps_to_itself else [])
        before = sys.stdout, sys.stderr, list(logging.getLogger().handlers)
        with log.libraries_to_file() as file:
            print("printed before the folder is there")
            file.open(tmp_path / "logs" / "rank-0.log")
            print("a print")
            print("a print to stderr", file=sys.stderr)
            deprecated = "a deprecation " + "of somebody"  # the line itself is shown with the warning
            warnings.warn(deprecated, UserWarning, stacklevel=1)
            library.warning("a library's warning")
            library.error("a library's error")
            log.logger.info("ours")
            with log.progress("work", 1, "pieces") as bar:
                bar.advance()
            assert log.terminal() is stderr
        assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == before
        text = (tmp_path / "logs" / "rank-0.log").read_text()
        both = ("a library's error", "ours", "work: 100%")
        for part in ("printed before the folder is there", "a print\n", "a print to stderr", "a deprecation of somebody",
                     "a library's warning", "INFO h3scale: ours", *both):  # fmt: skip
            assert text.count(part) == 1, part
        assert [line.split("  ")[0] for line in stderr.getvalue().splitlines()] == list(both)


def test_a_handler_that_a_library_has_made_writes_to_the_file_and_afterwards_to_the_terminal_again(tmp_path: Path) -> None:
    with Terminal(io.StringIO()) as stderr:
        library = logging.getLogger("some.library")
        library.propagate = False
        library.addHandler(logging.StreamHandler(sys.stderr))
        with log.libraries_to_file() as file:
            file.open(tmp_path / "log")
            made_inside = logging.getLogger("another.library")
            made_inside.propagate = False
            made_inside.addHandler(logging.StreamHandler(sys.stdout))
            library.warning("inside")
            made_inside.warning("inside, too")
        library.warning("outside")
        made_inside.warning("outside, too")
        assert (tmp_path / "log").read_text() == "inside\ninside, too\n"
        assert stderr.getvalue() == "outside\noutside, too\n"
        library.handlers.clear()
        made_inside.handlers.clear()


def test_a_crash_passes_through_with_its_traceback_in_the_file_and_the_place_on_the_terminal(tmp_path: Path) -> None:
    with Terminal(io.StringIO()) as stderr:
        with pytest.raises(RuntimeError):
            fail("noise", RuntimeError("a bug"), tmp_path / "log")
        assert "RuntimeError: a bug" in (tmp_path / "log").read_text()
        assert stderr.getvalue() == f"what libraries said before: {tmp_path / 'log'}\n"
        assert sys.stderr is stderr


def test_a_crash_before_there_is_a_file_shows_what_was_kept() -> None:
    with Terminal(io.StringIO()) as stderr:
        with pytest.raises(RuntimeError):
            fail("cannot find a compiler", RuntimeError("a bug"))
        assert "cannot find a compiler" in stderr.getvalue()


def test_an_error_for_people_stays_one_line(tmp_path: Path) -> None:
    with Terminal(io.StringIO()) as stderr:
        with pytest.raises(DataError):
            fail("noise", DataError("records: none"), tmp_path / "log")
        assert stderr.getvalue() == ""


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    with Terminal(io.StringIO()) as stderr:
        (tmp_path / "file").write_text("")
        with log.libraries_to_file() as file:
            file.open(tmp_path / "file" / "log")
            print("lost")
        assert stderr.getvalue().startswith(f"{tmp_path / 'file' / 'log'}: messages of libraries are not kept (")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (185, "3:05"), (3723, "1:02:03")])
def test_times_have_hours_only_when_there_are_any(seconds: float, text: str) -> None:
    assert log.clock(seconds) == text
