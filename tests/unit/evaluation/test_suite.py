"""Suites on models: what is read and found wrong, going on after a kill, several processes, and the verb around it."""

import json
import os
import shutil
from itertools import pairwise

import pytest

from h3scale.cli.evaluate import evaluate
from h3scale.cli.report import report
from h3scale.config.suite import SHIPPED
from h3scale.data.builtin import builtin_records
from h3scale.data.encode import encode_records
from h3scale.data.records import Record, split_by_instruction, write_records
from h3scale.data.sources import read_records
from h3scale.errors import ConfigError, DataError, MissingInputError, OutputError, PeerLostError, UsageError
from h3scale.evaluation import run_suite
from h3scale.evaluation.journal import Journal
from h3scale.evaluation.report import report as write_report
from h3scale.evaluation.run_suite import evaluate_suite
from h3scale.evaluation.score import score
from h3scale.evaluation.suite import Unit, load_suite, score_suite, work_of
from h3scale.study.run import MARKER

from .conftest import THREE, WORDS, make_dense, make_records, save, save_models
from .fake import fake_out
from .test_verbs import run

SUITE = """
name: words
tasks:
  known: {kind: nll, file: records.jsonl}
  which: {kind: choices, file: choices.jsonl, alignment: honest}
  rather: {kind: pairs, file: pairs.jsonl, alignment: helpful, where: {kind: a}}
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = save_models(tokenizer, tmp_path_factory.mktemp("suite"))
    (folder / "data").mkdir()
    write_records(folder / "data" / "records.jsonl", make_records(THREE.alignments, 16))
    questions = [
        {"question": f"say {a} {b}", "mc1_choices": [b, f"{a} {b}", "no"], "mc1_label": 0}
        | {"mc2_choices": [b, a, f"{a} {b}"], "mc2_labels": [1, 1, 0]}
        for a, b in pairwise(WORDS[:13])
    ]
    write(folder / "data" / "choices.jsonl", questions * 4)
    pairs = [{"prompt": f"why {a}", "chosen": f"yes {a}", "rejected": "no", "kind": "ab"[i % 2]} for i, a in enumerate(WORDS)]
    write(folder / "data" / "pairs.jsonl", pairs)
    (folder / "words.yaml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return load_suite(place / "words.yaml", place / "data")


@pytest.fixture(scope="module")
def whole(place, loaded):
    """What an evaluation in one go gives."""
    return evaluate_suite(loaded, {"base": place / "base", "fused": place / "fused"})


def score_of(result, task, metric, alignment):
    (found,) = [s for s in result["scores"] if (s["task"], s["metric"], s["alignment"]) == (task, metric, alignment)]
    return found


def test_a_model_in_memory_and_its_folder_have_the_same_scores(loaded, whole, tokenizer):
    assert score_suite(make_dense(tokenizer, 1), tokenizer, loaded) == whole["base"]
    assert json.loads(json.dumps(whole["base"])) == whole["base"]


def test_every_task_has_its_scores_and_items(whole):
    result = whole["base"]
    kinds = {(s["task"], s["metric"], s["alignment"]) for s in result["scores"]}
    assert kinds == {
        *(("known", "nll", alignment) for alignment in THREE.alignments),
        *(("which", metric, "honest") for metric in ("mc1", "mc2", "mc3")),
        *(("rather", metric, "helpful") for metric in ("accuracy", "accuracy_per_token", "accuracy_per_char")),
    }
    assert {task: len(items) for task, items in result["items"].items()} == {"known": 48, "which": 48, "rather": 8}
    assert score_of(result, "which", "mc1", "honest")["groups"] == 12  # every question is there four times
    assert all(s["low"] <= s["mean"] <= s["high"] for s in result["scores"])


def test_nll_is_that_of_records(place, whole, tokenizer):
    expected = score(make_dense(tokenizer, 1), tokenizer, read_records([place / "data" / "records.jsonl"])).records
    found = whole["base"]["items"]["known"]
    assert [(item["id"], item["alignment"], item["tokens"]) for item in found] == [(r.id, r.alignment, r.tokens) for r in expected]
    assert [item["nll"] for item in found] == pytest.approx([r.nll_sum for r in expected], rel=1e-5)


def test_the_order_of_answers_changes_no_score(place, loaded, whole, tokenizer):
    """Another seed puts the answers in another order in their rows."""
    (place / "seeded.yaml").write_text(SUITE + "seed: 7\n")
    other = load_suite(place / "seeded.yaml", place / "data")
    orders = [[item.answers for item in suite.asked["which"]] for suite in (loaded, other)]
    assert orders[0] != orders[1]
    found = score_suite(make_dense(tokenizer, 1), tokenizer, other)
    assert [s["mean"] for s in found["scores"]] == pytest.approx([s["mean"] for s in whole["base"]["scores"]], abs=1e-5)


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(place, loaded, whole, tmp_path, monkeypatch):
    models = {"base": place / "base", "fused": place / "fused"}
    scored = []
    real = run_suite.score_unit

    def score_unit(model, unit, *more):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(unit.key)
        return real(model, unit, *more)

    monkeypatch.setattr(run_suite, "score_unit", score_unit)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(loaded, models, journal=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])  # as a kill or a full disk leaves it
    assert len(Journal(tmp_path).read()) == 3
    torn = scored.pop()
    first = list(scored)
    scored.clear()
    monkeypatch.setattr(run_suite, "score_unit", lambda model, unit, *more: (scored.append(unit.key), real(model, unit, *more))[1])
    assert evaluate_suite(loaded, models, journal=tmp_path) == whole
    assert scored[0] == torn
    assert not set(scored[: scored.index(torn) + 1]) & set(first)
    scored.clear()
    monkeypatch.setattr(run_suite, "open_model", None)  # nothing is left to score: no model is opened
    assert evaluate_suite(loaded, models, journal=tmp_path) == whole
    assert scored == []


def test_a_changed_model_is_scored_anew_and_a_changed_task_alone(place, loaded, tmp_path, monkeypatch, tokenizer):
    folder = shutil.copytree(place / "base", tmp_path / "model")
    before = evaluate_suite(loaded, {"m": folder}, journal=tmp_path / "journal")
    count = len(Journal(tmp_path / "journal").read())
    (place / "fewer.yaml").write_text(SUITE.replace("alignment: helpful,", "alignment: helpful, limit: 3,"))
    fewer = load_suite(place / "fewer.yaml", place / "data")
    found = evaluate_suite(fewer, {"m": folder}, journal=tmp_path / "journal")
    assert len(Journal(tmp_path / "journal").read()) == count + 1
    assert len(found["m"]["items"]["rather"]) == 3
    save(make_dense(tokenizer, 2), tokenizer, folder)
    assert evaluate_suite(loaded, {"m": folder}, journal=tmp_path / "journal")["m"]["scores"] != before["m"]["scores"]


@pytest.mark.distributed
def test_several_processes_give_what_one_gives(place, loaded, whole):
    found = evaluate_suite(loaded, {"base": place / "base", "fused": place / "fused"}, processes=2)
    assert found == whole


def test_the_oracle_goes_by_the_task_s_alignment(place, loaded, whole):
    oracle = evaluate_suite(loaded, {"fused": place / "fused"}, router="oracle")["fused"]
    assert oracle["items"] != whole["fused"]["items"]
    with pytest.raises(UsageError, match="is dense"):
        evaluate_suite(loaded, {"base": place / "base"}, router="oracle")
    with pytest.raises(UsageError, match="none of trained"):
        evaluate_suite(loaded, {"base": place / "base"}, router="best")


def test_held_out_records_are_those_that_data_split_keeps_out(tmp_path):
    train = builtin_records(0, 40, 4)[0]
    write(tmp_path / "all.jsonl", train)
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {t: {kind: nll, file: all.jsonl, heldout_share: 0.3, alignment: honest}}")
    expected = split_by_instruction(read_records([tmp_path / "all.jsonl"], ["honest"]), 0.3, 0)[1]
    assert load_suite(tmp_path / "s.yaml").asked["t"] == expected
    assert 0 < len(expected) < 40


def test_the_built_in_suite_is_whole_and_its_tasks_are_of_three_alignments():
    suite = load_suite("builtin")
    assert {task.kind for task in suite.suite.tasks.values()} == {"nll", "choices", "pairs"}
    alignments = {task.alignment for task in suite.suite.tasks.values()} | {record.alignment for record in suite.asked["heldout"]}
    assert alignments >= set(THREE.alignments)
    assert set(SHIPPED) == {"3h", "builtin"}


def test_what_is_wrong_with_a_suite_is_told_in_lines(place, tmp_path):
    def suite(text):
        (tmp_path / "s.yaml").write_text(f"name: s\ntasks:\n{text}")
        return tmp_path / "s.yaml"

    with pytest.raises(MissingInputError, match="works: 3h, builtin, or a YAML file"):
        load_suite("4h")
    with pytest.raises(MissingInputError, match="--data FOLDER") as error:
        load_suite("3h")
    assert len(error.value.findings) == 7  # each file once, and the way out
    with pytest.raises(ConfigError, match=r"s.yaml: tasks.t.fil: unknown key \(did you mean 'file'\?\)"):
        load_suite(suite("  t: {kind: nll, fil: records.jsonl, file: a}"), place / "data")
    two = suite("  a: {kind: pairs, file: choices.jsonl}\n  b: {kind: pairs, file: no.jsonl}")
    with pytest.raises(DataError, match=r"choices.jsonl:1: prompt: is missing") as error:
        load_suite(two, place / "data")
    assert "no.jsonl: no such file" in error.value.findings[-1]


def test_conversations_are_scored_after_all_their_turns(place, tokenizer, tmp_path):
    def row(*turns):
        said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return {
            "chosen": [*said, {"role": "assistant", "content": "red"}],
            "rejected": [*said, {"role": "assistant", "content": "blue"}],
        }

    write(tmp_path / "p.jsonl", [row("cat", "dog", "why"), row("sun", "moon", "why"), row("cat", "dog", "why"), row("why")])
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {t: {kind: pairs, file: p.jsonl}}")
    model = make_dense(tokenizer, 1)
    loaded = load_suite(tmp_path / "s.yaml")
    entries = score_suite(model, tokenizer, loaded)["items"]["t"]
    assert [entry["group"] for entry in entries] == [0, 1, 0, 2]
    (unit,) = work_of(tokenizer, loaded, 64).units
    first, other, again, alone = ({tuple(a): v for a, v in zip(i.answers, s, strict=True)} for i, s in scored_alone(model, unit))
    assert first == pytest.approx(again)
    assert len({round(sums[next(iter(first))], 4) for sums in (first, other, alone)}) == 3  # the turns before are seen
    write_records(tmp_path / "r.jsonl", [Record(str(i), "honest", "why", "red", history=h) for i, h in enumerate(HISTORIES)])
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {t: {kind: nll, file: r.jsonl}}")
    entries = score_suite(model, tokenizer, load_suite(tmp_path / "s.yaml"))["items"]["t"]
    assert [entry["group"] for entry in entries] == [0, 1, 1]
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {t: {kind: pairs, file: p.jsonl, template: 'Q: {prompt}'}}")
    with pytest.raises(DataError, match=r"p.jsonl:1: has turns before its prompt, for which `template` has no place"):
        load_suite(tmp_path / "s.yaml")


HISTORIES = ((), (("user", "cat"), ("assistant", "dog")), (("user", "cat"), ("assistant", "dog")))


def scored_alone(model, unit):
    from h3scale.evaluation.answers import log_probs

    return zip(unit.items, log_probs(model, unit.items), strict=True)


def test_items_that_do_not_fit_are_counted(place, tokenizer, tmp_path):
    write(tmp_path / "p.jsonl", [{"prompt": "cat", "chosen": "red " * n + "dog", "rejected": "no"} for n in (1, 62, 80)])
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {t: {kind: pairs, file: p.jsonl}}")
    result = score_suite(make_dense(tokenizer, 1), tokenizer, load_suite(tmp_path / "s.yaml"))
    assert [item["id"] for item in result["items"]["t"]] == ["1", "2"]
    assert result["notes"] == [
        "t: 1 of 3 items have a prompt whose beginning was cut, to fit the model's 64 tokens",
        "t: 1 of 3 items were left out: an answer alone is longer than the model's 64 tokens",
    ]
    write(tmp_path / "p.jsonl", [{"prompt": "cat", "chosen": "red " * 80, "rejected": "no"}])
    with pytest.raises(DataError, match="nothing fits the model's 64 tokens"):
        score_suite(make_dense(tokenizer, 1), tokenizer, load_suite(tmp_path / "s.yaml"))


def test_the_verb_shows_models_side_by_side_and_draws_them(place, tmp_path, whole):
    out = tmp_path / "evaluation"
    text = run(evaluate, place / "base", place / "other", place / "fused", "--suite", place / "words.yaml", "--data",
               place / "data", "--records", place / "data" / "records.jsonl", "--out", out)  # fmt: skip
    values = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert values["base"]["suite"] == whole["base"]
    assert {"nll", "suite", "records", "paired"} <= set(values["fused"])
    paired = values["fused"]["suite"]["paired"]
    assert set(paired) == {"base", "other"}
    (mc1,) = [d for d in paired["base"] if d["metric"] == "mc1"]
    means = [score_of(whole[name], "which", "mc1", "honest")["mean"] for name in ("fused", "base")]
    assert mc1["mean"] == pytest.approx(means[0] - means[1])
    assert "Suite words" in text
    assert "which (honest): MC1" in text
    assert (out / "scores.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation"]  # what was remembered for going on is gone
    last = text.splitlines()[-1]
    assert last.startswith(f"results: {out}/   picture: {out / 'scores.png'}   next: h3scale generate")


def test_one_model_and_a_suite_alone(place, tmp_path, whole):
    run(evaluate, place / "base", "--suite", place / "words.yaml", "--data", place / "data", "--out", tmp_path / "base.json")
    assert json.loads((tmp_path / "base.json").read_text()) == {"suite": whole["base"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "base.png"]


def test_what_is_asked_wrongly_is_one_line(place, tmp_path):
    model, out = place / "base", ("--out", tmp_path / "x.json")
    for error, message, words in [
        (UsageError, "nothing to score on", (model, *out)),
        (UsageError, "--generate: needs --records", (model, *out, "--suite", "builtin", "--generate", 2)),
        (UsageError, "works with --suite", (model, *out, "--records", place / "data" / "records.jsonl", "--data", place)),
        (MissingInputError, "no such model folder", (place / "no", *out, "--suite", "builtin")),
        (OutputError, "exists already", (model, "--suite", "builtin", "--out", place / "words.yaml.json")),
    ]:
        (place / "words.yaml.json").write_text("{}")
        with pytest.raises(error, match=message):
            run(evaluate, *words)


def test_the_report_has_a_section_on_the_suite(tmp_path, whole):
    out = fake_out(tmp_path / "out", steps=60)
    before = report_text(out)
    assert "Scores without a judge" not in before
    difference = {"task": "which", "metric": "mc1", "alignment": "honest", "mean": 0.1, "low": 0.05, "high": 0.2, "better": True}
    suites = {"base": whole["base"], "fused": {**whole["fused"], "paired": {"base": [difference]}}}
    for name, suite in suites.items():
        path = out / "evaluation" / f"{name}.json"
        value = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**value, "suite": suite}))
    page = report_text(out)
    assert "Scores without a judge" in page
    base = score_of(whole["base"], "which", "mc1", "honest")
    assert f"{base['mean']:.3f} ▲<small>{base['low']:.3f} to {base['high']:.3f}</small>" in page
    assert (out / "plots" / "scores.png").is_file()


def compared(task, metric, better):
    return {"task": task, "metric": metric, "alignment": "honest", "mean": 0.1, "low": 0.05, "high": 0.2, "better": better}


def test_a_report_of_a_suite_alone_has_its_scores_and_no_nll_of_records(tmp_path, whole):
    """The last of the command is the main one, whatever its name; here it comes before the other in the alphabet."""
    (tmp_path / "evaluation").mkdir()
    told = [compared("which", "mc1", True), compared("which", "mc2", False), compared("which", "mc3", None)]
    last = {**whole["base"], "paired": {"fused": told}, "notes": ["which: 1 of 48 items <was> cut"]}
    for name, suite in (("base", last), ("fused", whole["fused"])):
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps({"suite": suite}))
    assert f"report: {tmp_path / 'report.html'}" in run(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Base is better in 1 of 3 comparisons, worse in 1</h1>" in page
    assert "Suite words: 9 scores on 104 items, of 2 models." in page
    assert page.index(">fused</th>") < page.index(">base</th>")
    other = score_of(whole["fused"], "which", "mc1", "honest")
    assert f"{other['mean']:.3f} ▲<small>{other['low']:.3f} to {other['high']:.3f}</small>" in page
    assert "<p>base: which: 1 of 48 items &lt;was&gt; cut</p>" in page
    for absent in ("NLL: sum over", "A record is placed right", "Who knows the answers", "held-out records: ."):
        assert absent not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "plots", "report.html"]
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["scores.png"]


def test_a_report_of_one_model_s_suite_compares_nothing(tmp_path, whole):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "fused.json").write_text(json.dumps({"suite": whole["fused"]}))
    run(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Fused: what it finds likely</h1>" in page
    assert "Suite words: 9 scores on 104 items.</p>" in page


def test_a_report_of_models_of_any_names_needs_no_results_json(place, tmp_path):
    data = ("--records", place / "data" / "records.jsonl", "--suite", place / "words.yaml", "--data", place / "data")
    run(evaluate, place / "fused", place / "base", *data, "--out", tmp_path / "evaluation")
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")}
    (tmp_path / "evaluation" / "fused.json").rename(tmp_path / "evaluation" / "moe.json")
    text = (tmp_path / "evaluation" / "base.json").read_text()
    (tmp_path / "evaluation" / "base.json").write_text(text.replace('"fused"', '"moe"'))
    run(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for entry in (*found["base"]["nll"].values(), *found["fused"]["nll"].values()):
        assert f">{entry['nll']:.3f}<small>{entry['low']:.3f} to {entry['high']:.3f}</small>" in page
    assert "<h3>Base minus each other model, record by record</h3>" in page
    assert "Scores without a judge" in page
    assert "NLL: sum over" in page
    assert not (tmp_path / "results.json").exists()


def test_a_study_has_a_page_of_its_own(tmp_path):
    (tmp_path / MARKER).touch()
    (tmp_path / "results.json").write_text(json.dumps({"models": [{"name": "base"}]}))
    with pytest.raises(UsageError, match=rf"^{tmp_path}: is a study: open study.html there$"):
        run(report, tmp_path)
    assert not (tmp_path / "report.html").exists()


def report_text(out):
    write_report(out)
    return (out / "report.html").read_text()


def test_a_tokenizer_of_records_is_that_of_items(place, loaded, tokenizer):
    """A record and a pair of the same texts have the same tokens, but for the end of the turn."""
    from h3scale.evaluation.answers import encode_items

    (asked,), _ = encode_items(tokenizer, loaded.asked["rather"][:1], None, 64)
    item = asked.item
    record = next(iter(make_records(("helpful",), 1)))
    (encoded,) = encode_records(tokenizer, [type(record)("1", "helpful", item.prompt, item.answers[item.best])])
    assert encoded.input_ids[:-1] == asked.prompt + asked.answers[item.best]


class Deadly(Unit):
    """A unit that ends the process which it is sent to."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.distributed
def test_a_killed_worker_is_told_and_the_rest_is_kept(place, loaded, whole, tmp_path, monkeypatch):
    def with_a_deadly_end(*asked):
        work = work_of(*asked)
        last = work.units.pop()
        work.units.append(Deadly(last.task, last.items, last.key))
        return work

    monkeypatch.setattr(run_suite, "work_of", with_a_deadly_end)
    with pytest.raises(PeerLostError, match="a scoring process was killed") as error:
        evaluate_suite(loaded, {"base": place / "base"}, processes=2, journal=tmp_path)
    assert error.value.exit_code == 69
    monkeypatch.undo()
    assert len(Journal(tmp_path).read()) >= 1
    assert evaluate_suite(loaded, {"base": place / "base"}, journal=tmp_path)["base"] == whole["base"]
