"""Inspection: numbers like those of a slow count, a simulation that finds planted faults, output that leaves terminals alone."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from h3scale.cli.data_inspect import inspect
from h3scale.config.data import Data
from h3scale.data import inspect_plan, simulate
from h3scale.data.inspect import Inspection, inspect_run
from h3scale.data.inspect_plan import curves, plan_numbers
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.data.plan import Plan
from h3scale.data.prepare import prepare
from h3scale.data.samples import plain, sample_row, sample_rows, shortened
from h3scale.errors import DataError, H3Error, UsageError
from tests.tiny import WORDS, tiny_tokenizer

ALIGNMENTS = ("helpful", "harmless", "honest")
THIRDS = dict.fromkeys(ALIGNMENTS, 1)
PNG = b"\x89PNG\r\n\x1a\n"
RECIPE = """
init: random
tokenizer: {tokenizer}
architecture: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}}
out: {out}
data: {{records: [{records}], sequence_length: 32, rows_per_batch: 8, hygiene: {{near_duplicates: null}}}}
steps: 12
rows_per_micro_batch: 2
trainable: [all]
optimizer: {{learning_rate: 0.001}}
deepspeed: ds_configs/cpu_dense.json
"""


def line(i: int, **changes: object) -> dict[str, object]:
    words = [WORDS[(i * step + i // 7 + step) % len(WORDS)] for step in (1, 2, 3, 5, 7, 11, 13)]
    prompt = f"{i} {' '.join(words[: 1 + i % 6])}"
    return {
        "id": f"r{i}",
        "alignment": ALIGNMENTS[i % 5 % 3],
        "prompt": prompt,
        "response": " ".join(words[: 1 + i % 7]),
        **changes,
    }


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(text if isinstance(text, str) else json.dumps(text) + "\n" for text in lines), encoding="utf-8")
    return path


def make(folder: Path, steps: int = 40, alignments=ALIGNMENTS, lines=None, tokenizer=None, **settings: object) -> TypedLoader:
    path = write(folder / "train.jsonl", lines or [line(i) for i in range(150)])
    hygiene = {"near_duplicates": None}
    data = Data.model_validate(
        {"records": [str(path)], "hygiene": hygiene, "sequence_length": 40, "rows_per_batch": 8, "max_bad": 1.0, **settings}
    )
    store = prepare(data, tokenizer or tiny_tokenizer(), folder / "prepared")
    return TypedLoader(store, data, seed=3, alignments=alignments, steps=steps)


def run(*words: object) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(inspect)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, H3Error):
        result.exception.output = result.output  # type: ignore[attr-defined]
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "tokenizer")
    records = write(tmp_path / "train.jsonl", [line(i) for i in range(150)])
    recipe = RECIPE.format(tokenizer=tmp_path / "tokenizer", out=tmp_path / "models" / "base", records=records)
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


# --- Numbers ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": "separate"},
        {"weights": {"helpful": 3, "harmless": 1, "honest": 0}},
        {"temperature": 1.0, "sequence_length": 11},
        {"schedule": [{"from_step": 0, "weights": THIRDS}, {"from_step": 9, "weights": {**THIRDS, "helpful": 2}}]},
    ],
    ids=["equal", "separate", "weights", "cut", "schedule"],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_numbers_of_the_plan_are_those_of_a_slow_count(tmp_path: Path, monkeypatch, settings: dict, chunk: int) -> None:
    monkeypatch.setattr(inspect_plan, "CHUNK", chunk)
    loader = make(tmp_path, **settings)
    found = plan_numbers(loader, 2)
    used: Counter[int] = Counter()
    for step in range(40):
        batch = loader.batch(step)
        planned = loader.mixture.at(step)
        tokens = [sum(int(loader.kept[i]) for i in batch.records if loader.records.labels[i] == a) for a in range(3)]
        used.update(int(loader.records.labels[i]) for i in batch.records)
        shares = [count / sum(tokens) for count in tokens]
        worst = 0.0
        for part in rows_of_rank(batch, 0, 1, 2):
            ids = np.concatenate(part)
            mine = [sum(int(loader.kept[i]) for i in ids if loader.records.labels[i] == a) for a in range(3)]
            worst = max(worst, *(abs(mine[a] - planned[a] * sum(mine)) / loader.length for a in range(3)))
        assert found.tokens_SA[step].tolist() == tokens
        assert found.planned_SA[step].tolist() == planned.tolist()
        assert found.distance_S[step] == pytest.approx(sum(abs(s - p) for s, p in zip(shares, planned, strict=True)) / 2)
        assert found.waste_S[step] == pytest.approx(1 - sum(tokens) / (8 * loader.length))
        assert found.epochs_SA[step] == pytest.approx([used[a] / loader.records_A[a] for a in range(3)])
        assert found.micro_batch_rows_S[step] == pytest.approx(worst)
    assert found.realised_A == pytest.approx(found.tokens_SA.sum(0) / found.tokens_SA.sum())
    assert found.planned_A.sum() == pytest.approx(1)


def test_numbers_of_alignments_and_lengths_are_those_of_a_slow_count(tmp_path: Path) -> None:
    loader = make(tmp_path, sequence_length=9)
    found = inspect_run(loader, 2)
    for a, item in enumerate(found.alignments):
        mine = [i for i in range(len(loader.records)) if loader.records.labels[i] == a]
        lengths = sorted(int(loader.records.lengths[i]) for i in mine)
        fit = [i for i in mine if loader.kept_responses[i] > 0]
        assert (item.name, item.records, item.left_out) == (ALIGNMENTS[a], len(fit), len(mine) - len(fit))
        assert item.tokens == sum(min(int(loader.records.lengths[i]), 9) for i in fit)
        assert item.cut == sum(loader.records.lengths[i] > 9 for i in fit) > 0
        assert (item.shortest, item.longest) == (lengths[0], lengths[-1])
        assert item.median == lengths[(len(lengths) - 1) // 2]
        assert item.response_share == pytest.approx(sum(int(loader.kept_responses[i]) for i in fit) / item.tokens)
        edges, counts = found.lengths.edges.tolist(), found.lengths.counts_AB[a].tolist()
        assert counts == [sum(low <= n < high for n in lengths) for low, high in pairwise(edges)]
        assert sum(counts) == len(mine)


def test_each_source_has_its_own_records_and_losses(tmp_path: Path) -> None:
    one = write(
        tmp_path / "a:1.jsonl",
        [line(i) for i in range(40)] + ["{\n", line(90, prompt=line(4)["prompt"], response=line(4)["response"])],
    )
    two = write(tmp_path / "b.jsonl", [line(i) for i in range(40, 70)] + ["[]\n", "[]\n"])
    data = Data.model_validate(
        {"records": [str(one), str(two)], "max_bad": 1.0, "sequence_length": 40, "hygiene": {"near_duplicates": None}}
    )
    loader = TypedLoader(prepare(data, tiny_tokenizer(), tmp_path / "prepared"), data, seed=0, steps=2)
    found = inspect_run(loader, 2)
    assert [source.path for source in found.sources] == [str(one), str(two)]
    assert [source.records for source in found.sources] == [40, 30]
    assert [source.dropped for source in found.sources] == [
        {"bad": 1, "exact_duplicate": 1, "near_duplicate": 0, "heldout": 0},
        {"bad": 2, "exact_duplicate": 0, "near_duplicate": 0, "heldout": 0},
    ]
    assert sum(source.lines for source in found.sources) == 74


def test_an_ended_alignment_s_share_goes_to_the_others(tmp_path: Path) -> None:
    loader = make(tmp_path, max_epochs={"honest": 1})
    found = plan_numbers(loader, 2)
    step = found.ended["honest"]
    assert 0 < step < 39
    assert found.tokens_SA[step + 1 :, 2].sum() == 0 < found.tokens_SA[step - 1, 2]
    assert found.planned_SA[step + 1 :].tolist() == [[0.5, 0.5, 0.0]] * (39 - step)
    assert found.epochs_SA[-1, 2] == 1
    assert found.distance_S[step + 1 :].mean() < 0.1
    again = plan_numbers(make(tmp_path, steps=step, max_epochs={"honest": 1}), 2)  # the longer plan is found again
    assert again.ended == {}
    assert again.steps == step


def test_curves_are_means_over_stretches_that_cover_the_run(tmp_path: Path) -> None:
    found = plan_numbers(make(tmp_path), 2)
    line = curves(found, 7)
    begins = [0, *line["step"][:-1]]
    assert line["step"][-1] == 40
    for p, (begin, end) in enumerate(zip(begins, line["step"], strict=True)):
        tokens = found.tokens_SA[begin:end].sum(0)
        assert line["share"][p] == pytest.approx(tokens / tokens.sum())
        assert line["low"][p] == pytest.approx(found.share_SA[begin:end].min(0))
        assert line["waste"][p] == pytest.approx(found.waste_S[begin:end].mean())
        assert line["epochs"][p] == pytest.approx(found.epochs_SA[end - 1])
    assert len(curves(found, 100)["step"]) == 40


def test_a_million_uses_of_records_are_counted_in_a_moment(tmp_path: Path) -> None:
    loader = make(tmp_path, steps=1)
    rows = 8 * 2_500
    records = np.random.default_rng(0).permutation(np.tile(np.flatnonzero(loader.usable), 10_000))[: rows * 50]
    loader.steps, loader.plan = 2_500, Plan(records.astype(np.uint32), np.arange(rows + 1) * 50, [])
    started = time.monotonic()
    assert plan_numbers(loader, 2).uses_SA.sum() == 1_000_000
    assert time.monotonic() - started < 5  # about a tenth of a second where nothing else runs


# --- Simulation ---


def test_the_order_is_sound_and_the_same_for_every_number_of_ranks(tmp_path: Path) -> None:
    loader = make(tmp_path)
    found = [simulate.simulate(loader, ranks, 30, 2) for ranks in (1, 2, 4)]
    assert [item.faults for item in found] == [[], [], []]
    assert len({item.order for item in found}) == 1
    assert len({tuple(item.tokens_NA.sum(0).tolist()) for item in found}) == 1
    assert simulate.simulate(loader, 2, 29, 2).order != found[0].order
    other = TypedLoader(loader.records, loader.data, seed=4, alignments=ALIGNMENTS, steps=40)
    assert simulate.simulate(other, 2, 30, 2).order != found[0].order


def test_tokens_of_ranks_and_micro_batches_are_those_of_a_slow_count(tmp_path: Path) -> None:
    loader = make(tmp_path)
    found = simulate.simulate(loader, 2, 10, 2)
    ranks = np.zeros((2, 3), int)
    parts, spread, worst = [], 0.0, 0.0
    for step in range(10):
        batch = loader.batch(step)
        mine = [[tokens_of(loader, part) for part in rows_of_rank(batch, rank, 2, 2)] for rank in range(2)]
        total = np.sum(mine, (0, 1))
        by_rank = np.sum(mine, (1, 2))
        spread = max(spread, abs(by_rank[0] - by_rank[1]) / by_rank.mean())
        for rank in range(2):
            for part in mine[rank]:
                ranks[rank] += part
                parts.append(part)
                worst = max(worst, float(np.abs(part - total / total.sum() * part.sum()).max()) / loader.length)
    assert found.tokens_NA.tolist() == ranks.tolist()
    assert found.fewest_A.tolist() == np.min(parts, 0).tolist()
    assert found.most_A.tolist() == np.max(parts, 0).tolist()
    assert (found.fewest, found.most) == (np.sum(parts, 1).min(), np.sum(parts, 1).max())
    assert found.rank_spread == pytest.approx(spread)
    assert found.imbalance_rows == pytest.approx(worst)


def tokens_of(loader: TypedLoader, rows: list[np.ndarray]) -> np.ndarray:
    ids = np.concatenate(rows)
    return np.array([loader.kept[ids][loader.records.labels[ids] == a].sum() for a in range(3)])


def dealing(change):
    """rows_of_rank with a fault in every step."""

    def deal(batch: GlobalBatch, rank: int, world_size: int, rows: int) -> list[list[np.ndarray]]:
        return change(rows_of_rank(batch, rank, world_size, rows), batch, rank)

    return deal


def repeat(parts, batch, rank):
    if rank == 1:
        parts[0][0] = batch.rows[0]
    return parts


def drop(parts, batch, rank):
    return [*parts[:-1], parts[-1][:-1]] if rank == 1 else parts


def foreign(parts, batch, rank):
    if rank == 0:
        parts[1][1] = parts[1][1][:-1]
    return parts


def swap_sizes(parts, batch, rank):
    return [parts[0] + parts[1]] if rank == 0 else parts


@pytest.mark.parametrize(
    ("change", "expected", "lost"),
    [
        (repeat, ["step 0: row 0 is dealt to ranks 0, 1"], (1, 0, 0)),
        (drop, ["step 0: rank 1 is dealt micro-batches of 2, 1 rows, not 2 of 2"], (1, 1, 1)),
        (foreign, ["step 0: rank 0 is dealt a row that is not in the global batch"], (0, 1, 1)),
        (swap_sizes, ["step 0: rank 0 is dealt micro-batches of 4 rows, not 2 of 2"], None),
    ],
)
def test_a_planted_fault_in_dealing_is_found(tmp_path: Path, monkeypatch, change, expected: list[str], lost) -> None:
    loader = make(tmp_path)
    if lost:  # rank, micro-batch and place of the row that nobody has any more
        rank, part, place = lost
        batch = loader.batch(0)
        row = rows_of_rank(batch, rank, 2, 2)[part][place]
        number = next(i for i, other in enumerate(batch.rows) if other is row)
        expected = [*expected, f"step 0: row {number} is dealt to no rank"]
    monkeypatch.setattr(simulate, "rows_of_rank", dealing(change))
    assert simulate.simulate(loader, 2, 1, 2).faults == expected
    faults = simulate.simulate(loader, 2, 30, 2).faults
    assert faults[: len(expected)] == expected
    assert len(faults) == 21
    assert faults[-1] == f"and {30 * len(expected) - 20} more"


def test_a_record_that_comes_too_early_or_should_not_come_is_found(tmp_path: Path) -> None:
    loader = make(tmp_path, lines=[line(i) for i in range(150)] + [line(200, prompt="say1 " * 60)])
    outside = int(np.flatnonzero(~loader.usable)[0])
    records = np.array(loader.plan.records)
    first = int(records[0])
    same = np.flatnonzero(loader.records.labels[records] == loader.records.labels[first])
    records[same[3]] = first  # a use of another record of the alignment, in the same epoch
    loader.plan = replace(loader.plan, records=records)
    name = loader.alignments[loader.records.labels[first]]
    assert f"{loader.records.where(first)} ({name}) comes more than once in epoch 0" in simulate.simulate(loader, 2, 5, 2).faults
    records[same[3]] = outside
    assert (
        f"{loader.records.where(outside)} is dealt, but is not one of the run's records"
        in simulate.simulate(loader, 2, 5, 2).faults
    )


def test_a_thousand_ranks_are_quick(tmp_path: Path) -> None:
    loader = make(tmp_path, rows_per_batch=1024, steps=5, sequence_length=20)
    started = time.monotonic()
    found = simulate.simulate(loader, 1024, 5, 1)
    assert time.monotonic() - started < 5
    assert found.faults == []
    assert found.tokens_NA.shape == (1024, 3)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (
            3,
            "3 x rows_per_micro_batch = 2 does not divide data.rows_per_batch = 8 (works: 1, 2, 4; or data.rows_per_batch=12)",
        ),
        (
            16,
            "16 x rows_per_micro_batch = 2 does not divide data.rows_per_batch = 8 (works: 1, 2, 4; or data.rows_per_batch=32)",
        ),
        (0, "not a number of ranks (works: 1, 2, 4)"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: int, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        simulate.check_ranks(ranks, 8, 2)
    assert caught.value.findings == [f"--ranks {ranks}: {expected}"]


# --- Rows as text ---


def test_a_row_is_shown_as_the_model_gets_it(tmp_path: Path) -> None:
    turns = [("system", "say0"), ("user", "ask1"), ("assistant", "tell1"), ("user", "ask2"), ("assistant", "tell2 tell3")]
    talk = {"id": "t", "alignment": "honest", "messages": [{"role": role, "content": text} for role, text in turns]}
    lines = [line(i) for i in range(20)] + [talk]
    tokenizer = tiny_tokenizer()
    loader = make(tmp_path, lines=lines, tokenizer=tokenizer, max_epochs=None)
    shown = {record.where: record for row in sample_rows(loader, tokenizer, 40) for record in row.records}
    place = f"{tmp_path / 'train.jsonl'}:"
    assert shown[f"{place}2"].alignment == "harmless"
    for i in range(20):
        text = "".join(text for _, text in shown[f"{place}{i + 1}"].pieces)
        assert [role for role, _ in shown[f"{place}{i + 1}"].pieces] == ["prompt", "response"]
        assert shown[f"{place}{i + 1}"].pieces[1][1].split()[:-1] == str(lines[i]["response"]).split()
        assert str(lines[i]["prompt"]).split()[1] in text
    pieces = shown[f"{place}21"].pieces
    assert [role for role, _ in pieces] == ["prompt", "response", "prompt", "response"]
    assert [text.split()[-1] for _, text in pieces] == ["<assistant>", "</s>", "<assistant>", "</s>"]
    assert "tell1" in pieces[1][1]
    row = sample_row(loader, tokenizer, 2, 5)
    assert (row.step, row.row) == (2, 5)
    assert row.padding == 40 - sum(record.tokens for record in row.records)
    assert [(item.step, item.row) for item in sample_rows(loader, tokenizer, 3)] == [(0, 0), (19, 7), (39, 7)]
    assert sample_rows(loader, tokenizer, 0) == []


def test_plain_text_cannot_move_a_cursor_and_keeps_what_can_be_read() -> None:
    assert plain("a\x1b[31mb\r\n\tc\u202ed\u200b\x9b\u2028") == "a\\x1b[31mb\\r\\n\\tc\\u202ed\\u200b\\x9b\\u2028"
    assert plain("Grüße, 世界 🙂 [bold]") == "Grüße, 世界 🙂 [bold]"
    assert plain("\ud800\U000e0001") == "\\ud800\\U000e0001"


def test_long_texts_are_shortened_and_say_by_how_much() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1_000))
    assert shortened(text, 100) == f"{text[:75]} ...(900 characters more)... {text[-25:]}"
    assert shortened(text[:110], 100) == text[:110]


# --- The verb ---


def test_the_verb_prints_numbers_and_leaves_a_picture_and_its_numbers(place: Path) -> None:
    output = run(place / "recipe.yaml", "steps=10", "--simulate", 8, "--ranks", 2)
    lines = output.splitlines()
    out = place / "models" / "inspect" / "base"
    assert lines[-2:] == [f"result: {out}", f"next:   h3scale train {place / 'recipe.yaml'} steps=10"]
    assert (out / "inspect.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in out.iterdir()) == ["inspect.json", "inspect.png"]
    value = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    assert set(value) == {"recipe", "order", "sources", "alignments", "plan", "lengths", "curves", "simulation"}
    assert list(value["alignments"]) == list(ALIGNMENTS)
    assert value["plan"]["steps"] == 10
    assert value["simulation"]["faults"] == []
    assert value["simulation"]["order"] in output
    assert f"{value['plan']['alignments']['honest']['realised']:.2%}" in output
    assert "[helpful]" in output
    assert " | prompt: <user> " in output
    assert "\x1b" not in output
    tables = [text for text in lines if "sha256" not in text and "|" not in text and not text.startswith((" ", "result", "next"))]
    assert max(len(text) for text in tables) <= 100
    before = (out / "inspect.json").read_bytes()
    run(place / "recipe.yaml", "steps=10", "--simulate", 8, "--ranks", 2)
    assert (out / "inspect.json").read_bytes() == before


def test_options_are_heeded(place: Path) -> None:
    output = run(place / "recipe.yaml", "alignment=honest", "--out", place / "look", "--samples", 0)
    assert "Row 0" not in output
    assert "Simulation" not in output
    value = json.loads((place / "look" / "inspect.json").read_text(encoding="utf-8"))
    assert list(value["alignments"]) == ["honest"]
    assert run(place / "recipe.yaml", "--samples", 3).count("Row ") == 3


def test_a_fused_model_s_label_order_is_taken_from_its_config(place: Path) -> None:
    model = place / "fused"
    tiny_tokenizer(model)
    order = ["honest", "helpful", "harmless"]
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "h3scale": {"alignments": order, "experts": order}}))
    run(place / "recipe.yaml", "init=model", f"model={model}", "tokenizer=null", "architecture=null", "--out", place / "look")
    assert list(json.loads((place / "look" / "inspect.json").read_text())["alignments"]) == order


def test_texts_of_records_are_no_markup_and_no_control_characters(tmp_path: Path) -> None:
    words = ("[bold]red[/]", "\x1b[31mESC", "\u202eRTL", "[/]", "$x$")
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", (*WORDS, *words))
    evil = "[red]a\x1b[2J$"
    name = "[link]x\x1b]0;t\x07.jsonl"
    lines = [
        {"id": f"{i}", "alignment": evil, "prompt": " ".join(words), "response": f"{WORDS[i]} {' '.join(words)}"} for i in range(9)
    ]
    records = write(tmp_path / name, lines)
    assert tokenizer.vocab_size > len(WORDS)
    recipe = RECIPE.format(tokenizer=tmp_path / "tokenizer", out=tmp_path / "models" / "base", records=json.dumps(str(records)))
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    output = run(tmp_path / "recipe.yaml", "--simulate", 2)
    assert [c for c in output if not c.isprintable() and c != "\n"] == []
    assert "[[red]a\\x1b[2J$]" in output
    assert "[bold]red[/] \\x1b[31mESC \\u202eRTL [/] $x$" in output
    assert "[link]x\\x1b]0;t\\x07.jsonl" in output


def test_what_does_not_fit_is_refused_before_anything_is_read(place: Path) -> None:
    (place / "train.jsonl").unlink()
    for words, expected in (
        (["--ranks", "2"], "--ranks 2: needs --simulate STEPS"),
        (["--simulate", "13"], "--simulate 13: the run has 12 steps (works: 1 to 12, or steps=13)"),
        (["--simulate", "0"], "--simulate 0: the run has 12 steps (works: 1 to 12)"),
        (["--simulate", "2", "--ranks", "5"], "--ranks 5: 5 x rows_per_micro_batch = 2 does not divide data.rows_per_batch = 8 "
         "(works: 1, 2, 4; or data.rows_per_batch=10)"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            run(place / "recipe.yaml", *words)
        assert caught.value.findings == [expected]


def test_a_faulty_order_is_shown_and_is_our_bug(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(simulate, "rows_of_rank", dealing(repeat))
    with pytest.raises(H3Error) as caught:
        run(place / "recipe.yaml", "--simulate", 3, "--ranks", 2)
    assert caught.value.exit_code == 70
    assert caught.value.findings[0] == "step 0: row 0 is dealt to ranks 0, 1"
    assert "not sound" in caught.value.output  # type: ignore[attr-defined]


def test_what_would_stop_the_training_is_said_after_all_has_been_shown(place: Path) -> None:
    with pytest.raises(DataError, match=r"data.max_bad is 1.00%") as caught:
        run(place / "recipe.yaml", "data.sequence_length=9")
    output = caught.value.output  # type: ignore[attr-defined]
    assert "Plan of 12 steps" in output
    assert "next:" not in output
    assert (place / "models" / "inspect" / "base" / "inspect.png").is_file()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_alignments_is_drawn(tmp_path: Path, count: int) -> None:
    from h3scale.cli.data_inspect_plots import draw

    names = [f"kind {a} with $ and a rather long name" for a in range(count)]
    lines = [line(i, alignment=names[i % count]) for i in range(15 * count)]
    found = inspect_run(make(tmp_path, lines=lines, alignments=names, steps=1), 2)
    assert isinstance(found, Inspection)
    draw(found, tmp_path / "inspect.png")
    assert (tmp_path / "inspect.png").read_bytes().startswith(PNG)
