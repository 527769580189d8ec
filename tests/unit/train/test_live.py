"""The view: drawn for every width, never at the run's cost, and the terminal is left as it was."""

import io
import itertools
import logging

import pytest
from rich.console import Console

from h3scale import log
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.train.live import BLOCKS, LEVELS, LiveView, PlainLines, View, bar, open_view, sparkline, summary
from h3scale.train.trackers import Line

ALIGNMENTS = ("helpful", "harmless", "honest")
EXPERTS = (*ALIGNMENTS, "helpful 2", "general")


def line_of(step: int, routed: bool = True) -> Line:
    line = {"step": step, "lm": 3.0 - step / 100, "lr": 1e-5, "grad_norm": 0.84, "tokens_per_s": 48213.2, "seconds": 1.5}
    line |= {f"lm/{a}": 2.0 + i for i, a in enumerate(ALIGNMENTS)}
    line |= {"mfu": 0.412, "memory_gib": 61.2, "seconds/data": 0.0, "seconds/forward": 0.5, "seconds/backward": 0.75}
    line |= {"seconds/step": 0.25}
    if routed:
        line |= {"router": 0.4, "drift": 0.01, "seconds/all_to_all": 0.3}
        line |= {f"router/{a}": 0.25 for a in ALIGNMENTS} | {f"router_accuracy/{a}": 0.875 for a in ALIGNMENTS}
        line |= {f"tokens_per_expert/{name}": 1000 * (i + 1) for i, name in enumerate(EXPERTS)}
        line |= {"load_max_over_mean": 1.25, "load_max_over_mean_worst_layer": 1.75}
    return line


def view(routed: bool = True, steps: int = 40) -> View:
    made = View("h3scale train checkpoints/fused", 100, ALIGNMENTS, EXPERTS if routed else (), ["MFU is of 989 TFLOP/s"])
    for step in range(1, steps + 1):
        made.take(line_of(step, routed))
    return made


def drawn(made: View, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    console.print(made)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def terminal(width: int = 100) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, height=40, force_terminal=True, color_system=None), stream


def test_everything_is_in_the_view() -> None:
    text = drawn(view(), 100)
    for part in ("checkpoints/fused", "step 40 of 100", "40%", "1:30 left", "48.2k tokens/s", "1.5 s a step", "MFU 41.2%",
                 "61.2 GiB", "lr 1.00e-05", "gradient 0.84", "MFU is of 989 TFLOP/s", "lm", "router", "drift", *EXPERTS,
                 "2.000", "88%", "1.25", "1.75", "backward", "50%", "of it all-to-all"):  # fmt: skip
        assert part in text, part


def test_a_dense_run_has_no_experts_in_its_view() -> None:
    text = drawn(view(routed=False), 100)
    assert "helpful" in text
    for part in ("expert", "router", "all-to-all", "busiest"):
        assert part not in text, part


@pytest.mark.parametrize("width", [20, 30, 40, 60, 83, 84, 100, 200])
@pytest.mark.parametrize("routed", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, routed: bool) -> None:
    for steps in (0, 1, 40):
        assert all(len(text) <= width for text in drawn(view(routed, steps), width).splitlines())


def test_an_ascii_terminal_gets_ascii_alone() -> None:
    assert "####" in drawn(view(), 100, encoding="ascii")


def test_curves_go_from_the_lowest_to_the_highest_level() -> None:
    assert sparkline(range(len(LEVELS)), 80) == LEVELS
    assert sparkline([*range(8), *range(8)], 2) == "▁▁"
    assert len(sparkline(range(1000), 37)) == 37
    assert sparkline([], 10) == sparkline([1.0], 0) == ""


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [bar(share, 4) for share in (0, 0.25, 0.5, 1, 7, -1)] == ["    ", "█   ", "██  ", "████", "████", "    "]
    lengths = [sum(BLOCKS.index(block) for block in bar(i / 100, 10)) for i in range(101)]
    assert all(a <= b for a, b in itertools.pairwise(lengths))


def test_warnings_appear_above_the_view_and_the_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.logger, "handlers", [log.TerminalHandler()])
    monkeypatch.setattr(log.logger, "propagate", False)
    console, stream = terminal()
    live = LiveView(view(), console)
    live.write(41, line_of(41))
    log.logger.warning("[honest] reaches data.max_epochs at step 7")
    live.close()
    shown = stream.getvalue()
    assert "[honest] reaches data.max_epochs at step 7\n" in shown
    assert shown.index("reaches data.max_epochs") < shown.rindex("step 41 of 100")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor
    assert shown.endswith("\n") or shown.endswith("\x1b[?25h")
    assert log._printer is None


def test_a_view_that_cannot_be_drawn_says_so_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = terminal()
    made = view()
    live = LiveView(made, console)
    monkeypatch.setattr(made, "_losses", lambda width: 1 / 0)
    live.write(41, line_of(41))
    live.live.refresh()
    live.close()
    assert "the view cannot be drawn: division by zero" in stream.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO)
    recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", ["steps=2"])
    plain = open_view(recipe, ALIGNMENTS, EXPERTS, ["MFU is of 989 TFLOP/s"])
    assert isinstance(plain, PlainLines)
    for step in (1, 2):
        plain.write(step, line_of(step))
    plain.close()
    assert [record.message.split("  ")[0] for record in caplog.records] == ["MFU is of 989 TFLOP/s", "train: 100%"]
    assert "lm 2.980  router 0.400  drift 0.010  right experts 88%+  48.2k tokens/s  MFU 41.2%" in caplog.text


def test_a_line_without_experts_sums_up_as_well() -> None:
    assert summary({"lm": 1.0, "tokens_per_s": 10.0}) == "lm 1.000  10 tokens/s"


HELD_OUT = {"step": 41, "heldout/lm": 3.5, "heldout/seconds": 2.0} | {f"heldout/lm/{a}": 3.25 + i for i, a in enumerate(ALIGNMENTS)}


@pytest.mark.parametrize("width", [40, 84, 112])
def test_held_out_figures_stand_beside_those_of_training(width: int) -> None:
    made = view()
    assert "held out" not in drawn(made, width)
    made.take(HELD_OUT)
    text = drawn(made, width)
    assert "held out" in text
    assert "3.250" in text
    assert "5.250" in text
    assert "step 40 of 100" in text


def test_held_out_figures_are_a_line_of_their_own_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    caplog.set_level(logging.INFO)
    lines = PlainLines(100)
    lines.write(1, line_of(1))
    lines.write(41, HELD_OUT)
    assert lines.bar.done == 1
    assert caplog.messages == ["step 41: held out: lm 3.5000  helpful 3.2500  harmless 4.2500  honest 5.2500"]


def test_a_skipped_step_without_a_loss_is_drawn() -> None:
    made = view()
    skipped = {name: value for name, value in line_of(41).items() if not name.startswith(("lm", "router/", "grad_norm"))}
    made.take(skipped | {"skipped": 1})
    assert "not finite" in drawn(made, 100)
    assert summary(skipped).endswith("MFU 41.2%")
