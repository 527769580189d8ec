"""results.json, the table and the page of a study that was not run: two seeds of invented items."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from h3scale.checkpoint.shards import ModelFolder, write_json
from h3scale.cli.main import app
from h3scale.config.study import load_study
from h3scale.errors import ConfigError, DataError, MissingInputError, UsageError
from h3scale.study.evidence import Evidence, read_seed, read_seeds
from h3scale.study.gather import _made_from, _without_folders, gather_seed, parameters_of
from h3scale.study.ledger import Ledger
from h3scale.study.outcome import assemble
from h3scale.study.plan import plan_study
from h3scale.study.study_page import headline, page
from h3scale.study.study_plots import frontier
from h3scale.study.study_table import markdown
from h3scale.study.tasks import Plan, Task

from .made_up import ALIGNMENTS, result

LEVELS = {
    "base": [3.0, 3.0, 3.0],
    "helpful": [2.0, 3.2, 3.2],
    "harmless": [3.2, 2.0, 3.2],
    "honest": [3.2, 3.2, 2.0],
    "mixture_balanced": [2.3, 2.3, 2.3],
    "linear": [2.8, 2.8, 2.8],
    "linear_searched": [2.7, 2.7, 2.7],
    "fused": [2.2, 2.2, 2.2],
    "ensemble": [2.6, 2.6, 2.6],
}
SEEDS = [3, 7]
SECONDS = 2.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study's commands leave, written by hand, and what it makes of that."""
    out = tmp_path_factory.mktemp("study")
    given = {"seeds": SEEDS, "merges": ["linear"], "search": {}, "resm": {}, "fusions": {"fused": {}}, "mixtures": ["balanced"]}
    given["compare"] = [["linear_searched", "mixture_balanced"]]
    recipe = load_study("recipes/study/builtin.yaml", given=given)
    plan, ledger = plan_study(recipe), Ledger(out)
    for task in plan.tasks:
        (out / task.makes[0]).parent.mkdir(parents=True, exist_ok=True)
        ledger.end(task, "key", SECONDS)
    for number, seed in enumerate(SEEDS):
        for model in plan.models:
            made = out / plan.task(f"seed-{seed}/scores/{model.group}").makes[0]
            if not made.suffix:
                made.mkdir(exist_ok=True)
            levels = [level + 0.01 * number for level in LEVELS[model.name]]
            value = {"suite": result(levels, seed=list(LEVELS).index(model.name))}
            write_json(made if made.suffix else made / f"{model.name}.json", value)
            folder = out / f"seed-{seed}/models/{model.name}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("{}")
            save_file({"weight": torch.zeros(5, 7)}, folder / "model.safetensors")
        pairs = [
            {
                "models": ["helpful", "harmless"],
                "cosine": 0.1 + number,
                "sign_conflict": None,
                "overlap": 0.2,
                "overlap_by_chance": 0.1,
            }
        ]
        explained = out / f"seed-{seed}/explain"
        explained.mkdir()
        write_json(explained / "explain.json", {"whole": {"pairs": pairs}})
    write_json(out / "results.json", assemble([gather_seed(recipe, plan, ledger, seed) for seed in SEEDS]))
    return out


@pytest.fixture(scope="module")
def results(study: Path) -> dict[str, Any]:
    return dict(json.loads((study / "results.json").read_text()))


def test_a_seeds_file_has_the_items_to_six_decimals_and_no_place_of_this_machine(study: Path) -> None:
    evidence = read_seed(study / "seed-7.json.gz")
    assert str(study.parent) not in evidence.model_dump_json()
    for name, found in evidence.results().items():
        wanted = result([level + 0.01 for level in LEVELS[name]], seed=list(LEVELS).index(name))
        assert found["scores"] == wanted["scores"]
        for task, items in wanted["items"].items():
            assert found["items"][task] == [
                {key: round(value, 6) if isinstance(value, float) else value for key, value in item.items()} for item in items
            ]


def test_seeds_of_several_machines_give_what_one_study_gives(study: Path, tmp_path: Path) -> None:
    paths = [tmp_path / place / f"seed-{seed}.json.gz" for place, seed in zip("ab", SEEDS, strict=True)]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes((study / path.name).read_bytes())
    out = tmp_path / "together"
    done = CliRunner().invoke(app, ["study", str(paths[1]), str(paths[0]), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"result: {out}/study.html" in done.output
    assert (out / "results.json").read_text() == (study / "results.json").read_text()
    assert (out / "table.md").read_text() == markdown(json.loads((study / "results.json").read_text()))
    CliRunner().invoke(app, ["study", str(paths[0]), "--out", str(out)], catch_exceptions=False)  # other seeds, the same place
    assert json.loads((out / "results.json").read_text())["seeds"] == SEEDS[:1]


def test_a_folder_stands_for_its_seeds_and_is_refused_without_any(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "together"
    done = CliRunner().invoke(app, ["study", str(study), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert (out / "results.json").read_text() == (study / "results.json").read_text()
    done = CliRunner().invoke(app, ["study", str(tmp_path), "--out", str(tmp_path / "none")])
    assert isinstance(done.exception, MissingInputError)
    assert str(done.exception).startswith(f"{tmp_path}: a folder without seed-N.json.gz")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["a/seed-0.json.gz", "--quick"], ["a/seed-0.json.gz", "recipe.yaml"], ["one.yaml", "two.yaml"]])
def test_a_recipe_and_seeds_files_do_not_mix(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", *words, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "out").exists()


def changed(study: Path, to: Path, change: Any) -> Path:
    """The second seed's file with something else in it."""
    evidence = json.loads(gzip.decompress((study / f"seed-{SEEDS[1]}.json.gz").read_bytes()))
    change(evidence)
    to.write_bytes(gzip.compress(json.dumps(evidence).encode()))
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda evidence: evidence["recipe"].update(main="average_shared", fusions={"average_shared": {}}), "fusions, main"),
        (lambda evidence: evidence["made_from"].update({"base.yaml": "0"}), "base.yaml"),
        (lambda evidence: evidence["models"].pop("linear"), "models"),
        (lambda evidence: evidence["models"]["linear"]["cost"].update(tokens=1), "models"),
        (lambda evidence: evidence.update(suite="other"), "suite"),
        (lambda evidence: evidence.update(version="0"), "version"),
        (lambda evidence: evidence.update(compare=[]), "compare"),
        (lambda evidence: evidence.update(seed=SEEDS[0]), "one seed"),
    ],
)
def test_seeds_of_another_study_are_refused_with_what_differs(study: Path, tmp_path: Path, change: Any, said: str) -> None:
    other = changed(study, tmp_path / "seed-7.json.gz", change)
    with pytest.raises(ConfigError, match=said):
        read_seeds([study / f"seed-{SEEDS[0]}.json.gz", other])


@pytest.mark.parametrize(
    "change",
    [
        lambda evidence: evidence.update(seed="7"),
        lambda evidence: evidence.pop("items"),
        lambda evidence: evidence["items"].pop("pairs"),
        lambda evidence: evidence["models"]["linear"]["items"]["pairs"]["accuracy"].pop(),
        lambda evidence: evidence["models"].clear(),
        lambda evidence: evidence["recipe"].pop("recipes"),
    ],
)
def test_a_damaged_seeds_file_is_one_line_and_leaves_no_folder(study: Path, tmp_path: Path, change: Any) -> None:
    bad, out = changed(study, tmp_path / "seed-7.json.gz", change), tmp_path / "out"
    done = CliRunner().invoke(app, ["study", str(bad), "--out", str(out)])
    assert isinstance(done.exception, DataError)
    assert not out.exists()


def test_files_of_one_name_in_two_folders_are_both_what_a_seed_is_made_from(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpful.jsonl").write_text(folder)
    data, score = ([tmp_path / folder / "helpful.jsonl"] for folder in ("one", "other"))
    tasks = [Task("data", "", [], ("x",), "data", files=tuple(data)), Task("e", "", [], ("y",), "evaluate", files=tuple(score))]
    assert len(set(_made_from(Plan(tasks, [])).values())) == 2


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/suite.yaml", "suite.yaml"),
        ("router.records=[/home/me/a.jsonl, /data/b.jsonl]", "router.records=[a.jsonl, b.jsonl]"),
        ("recipes/suites/3h.yaml", "recipes/suites/3h.yaml"),
        ("outliers=none", "outliers=none"),
    ],
)
def test_folders_from_the_root_are_left_out(text: str, left: str) -> None:
    assert _without_folders({"a": [text]}) == {"a": [left]}


def test_what_is_no_seeds_file_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        read_seed(tmp_path / "seed-0.json.gz")
    whole = (study / "seed-3.json.gz").read_bytes()
    for content in (b"", b"{}", whole[:-30], gzip.compress(b"[1]"), gzip.compress(b"{}"), gzip.compress(b"{")):
        (tmp_path / "seed-0.json.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"seed-0\.json\.gz"):
            read_seed(tmp_path / "seed-0.json.gz")


def nll_of(name: str, number: int) -> np.ndarray:
    """By hand, from the items: an alignment a row."""
    made = result([level + 0.01 * number for level in LEVELS[name]], seed=list(LEVELS).index(name))["items"]["known"]
    groups = [[item for item in made if item["alignment"] == alignment] for alignment in ALIGNMENTS]
    return np.array([sum(item["nll"] for item in group) / sum(item["tokens"] for item in group) for group in groups])


def test_gain_and_balance_are_of_the_nll_averaged_over_the_seeds(results: dict[str, Any]) -> None:
    mean = {name: (nll_of(name, 0) + nll_of(name, 1)) / 2 for name in LEVELS}
    singles = np.min([mean[name] for name in ALIGNMENTS], axis=0)
    for name in LEVELS:
        gains = (mean["base"] - mean[name]) / (mean["base"] - singles)
        found = results["models"][name]
        assert [found["gain"][a]["mean"] for a in ALIGNMENTS] == pytest.approx(gains)
        assert found["balance"]["mean"] == pytest.approx(gains.min())
    assert results["models"]["base"]["balance"]["mean"] == 0
    assert max(results["models"]["helpful"]["gain"][a]["mean"] for a in ALIGNMENTS) == 1


def test_differences_are_paired_by_seed(results: dict[str, Any]) -> None:
    each = [float((nll_of("fused", number) - nll_of("linear", number)).mean()) for number in range(len(SEEDS))]
    paired = results["models"]["linear"]["paired"]
    assert [paired["by_seed"][str(seed)] for seed in SEEDS] == pytest.approx(each)
    assert paired["mean_nll"]["mean"] == paired["over_seeds"]["mean"] == pytest.approx(np.mean(each))
    assert paired["verdict"] == "better"
    assert "paired" not in results["models"]["fused"]


def test_what_the_recipe_asks_of_two_models_is_told_with_the_difference_in_balance(results: dict[str, Any]) -> None:
    (pair,) = results["comparisons"]
    assert (pair["one"], pair["other"]) == ("linear_searched", "mixture_balanced")
    each = [float((nll_of("linear_searched", number) - nll_of("mixture_balanced", number)).mean()) for number in range(len(SEEDS))]
    assert pair["mean_nll"]["mean"] == pytest.approx(np.mean(each))
    assert pair["verdict"] == pair["balance_verdict"] == "worse"
    models = results["models"]
    gap = models["linear_searched"]["balance"]["mean"] - models["mixture_balanced"]["balance"]["mean"]
    assert pair["balance"]["mean"] == pytest.approx(gap)
    assert pair["balance"]["low"] < gap < pair["balance"]["high"] < 0
    for text in (page(results), markdown(results)):
        assert re.search(r"linear[_ ]searched less mixture[_ ]balanced", text)


def test_scores_of_answers_have_the_intervals_of_the_items_and_of_the_seeds(results: dict[str, Any]) -> None:
    score, of_none = results["models"]["linear"]["scores"]
    assert of_none["alignment"] is None
    assert score["mean"] == pytest.approx(np.mean(score["by_seed"]))
    assert score["low"] < score["mean"] < score["high"]
    assert score["over_seeds"]["mean"] == score["mean"]


def test_differences_of_scores_of_answers_are_paired_and_told_by_both_intervals(study: Path) -> None:
    def surely(evidence: Evidence, names: list[str]) -> Evidence:
        value = evidence.model_dump()
        for name, model in value["models"].items():
            model["items"]["pairs"]["accuracy"] = [float(name in names)] * 20
            next(each for each in model["scores"] if each["task"] == "pairs")["mean"] = float(name in names)
        return Evidence.model_validate(value)

    seeds = [surely(read_seed(study / f"seed-{seed}.json.gz"), ["fused", "ensemble", "linear_searched"]) for seed in SEEDS]
    results = assemble(seeds)
    apart = {name: model["paired"]["scores"][0] for name, model in results["models"].items() if "paired" in model}
    assert (apart["linear"]["task"], apart["linear"]["metric"], apart["linear"]["alignment"]) == ("pairs", "accuracy", "honest")
    assert apart["linear"]["mean"] == apart["linear"]["over_seeds"]["mean"] == 1.0
    assert (apart["linear"]["verdict"], apart["ensemble"]["verdict"]) == ("better", "undecided")
    (pair,) = results["comparisons"]  # linear_searched and mixture_balanced
    assert pair["scores"][0]["verdict"] == "better"
    assert "| linear | 0.000 worse |" in markdown(results)
    assert "<td>0.000 worse<small>" in page(results)
    assert "| ensemble | 1.000 |" in markdown(results)
    one_unsure = assemble([seeds[0], surely(read_seed(study / f"seed-{SEEDS[1]}.json.gz"), [])])
    assert one_unsure["models"]["linear"]["paired"]["scores"][0]["verdict"] == "undecided", "by the items alone"


def test_several_states_of_the_source_are_told(study: Path) -> None:
    seeds = [read_seed(study / f"seed-{seed}.json.gz") for seed in SEEDS]
    assert "of the source" not in markdown(assemble(seeds))
    seeds[1] = seeds[1].model_copy(update={"code": ["another"]})
    assert "Made by 2 states of the source." in markdown(assemble(seeds))


def test_a_models_cost_is_that_of_all_it_is_made_of_after_the_base(results: dict[str, Any]) -> None:
    models = results["models"]
    assert (models["base"]["tokens"], models["base"]["train_s"]) == (0, 0)
    assert (models["linear"]["train_s"], models["linear"]["make_s"]) == (3 * SECONDS, SECONDS)  # three aligned models, one merge
    assert (models["fused"]["train_s"], models["fused"]["make_s"]) == (
        4 * SECONDS,
        2 * SECONDS,
    )  # and its own training; fuse, consolidate
    assert models["ensemble"]["parameters"] == {"total": 3 * 35, "active": 3 * 35}
    assert models["mixture_balanced"]["same_tokens"]
    assert not models["linear"]["same_tokens"]


def test_the_map_of_conflict_is_each_aligned_model_less_the_base(results: dict[str, Any]) -> None:
    change = np.mean([nll_of("helpful", n) - nll_of("base", n) for n in range(2)], axis=0)
    assert [results["conflict"]["nll"]["helpful"][a]["mean"] for a in ALIGNMENTS] == pytest.approx(change)
    assert results["conflict"]["pairs"][0]["cosine"] == pytest.approx(0.6)
    assert results["conflict"]["pairs"][0]["sign_conflict"] is None


def test_parameters_that_a_token_meets_leave_out_the_experts_it_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 4, "num_experts_per_tok": 2}))
    experts = {f"layers.0.mlp.experts.{i}.w": torch.zeros(10) for i in range(4)}
    save_file({**experts, "layers.0.attention": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert parameters_of(ModelFolder(tmp_path)) == (47, 27)


def test_the_page_has_every_part_and_nothing_from_elsewhere(results: dict[str, Any]) -> None:
    text = page(results)
    parts = ["Who is balanced", "Is the difference real", "What aligning one does to the others", "Every number", "Other scores"]
    assert re.findall("<h2>(.*?)</h2>", text) == parts
    for name in ("What each model gains on each alignment", "What balance costs"):
        assert f'aria-label="{name}"' in text
    assert text.count("<svg") == 2
    for name in LEVELS:
        assert f"</i>{name.replace('_', ' ')}</th>" in text
    assert not re.search(r"<script|<link|<img|https?://|src=", text)
    assert headline(results) in text
    assert "-0.0000" not in text


def test_a_study_of_one_seed_that_says_nothing_of_balance_has_a_page(results: dict[str, Any]) -> None:
    """No aligned model better than the base, no times known, no pairs: parts are left out, nothing fails."""
    bare = json.loads(json.dumps(results))
    bare["seeds"] = SEEDS[:1]
    bare["conflict"]["pairs"] = []
    for model in bare["models"].values():
        none = {"mean": None, "low": None, "high": None}
        model |= {"train_s": None, "balance": none, "mean_gain": none, "gain": dict.fromkeys(ALIGNMENTS, none), "scores": []}
    text = page(bare)
    assert "<svg" not in text
    assert "Other scores" not in text
    assert "one seed" in text
    assert "| none |" in markdown(bare)


def test_the_table_has_a_line_a_model_and_says_where_tokens_are_others(results: dict[str, Any]) -> None:
    lines = markdown(results).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(LEVELS)
    assert len({line.count("|") for line in lines}) == 1
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {row[0].strip().strip("*"): row for row in (line.strip("|").split("|") for line in lines[2:])}
    assert rows["mixture_balanced"][heads.index("as many")].strip() == "yes"
    assert rows["linear"][heads.index("as many")].strip() == "no"
    assert [rows["linear"][at].strip() for at in (-4, -1)] == ["better", "better"]


def test_the_frontier_leaves_out_what_another_beats_in_both() -> None:
    points = {"cheap": (1.0, 0.2), "beaten": (2.0, 0.1), "good": (3.0, 0.9), "dear": (5.0, 0.9), "best": (9.0, 1.0)}
    assert frontier(points) == ["cheap", "good", "best"]
