"""A study's plan and its keys: what is compared, in which order, and what a change runs again."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from h3scale.config.base import load_recipe
from h3scale.config.merge import OPTIONS
from h3scale.config.recipe import TrainRecipe
from h3scale.config.study import StudyRecipe, load_study
from h3scale.errors import ConfigError, MissingInputError
from h3scale.study import ledger
from h3scale.study.ledger import keys_of
from h3scale.study.plan import TEST, TRAIN, VALIDATION, plan_study
from h3scale.study.tasks import FUSION, MERGE, MIXTURE, RESM, SEARCHED, Plan
from tests.conftest import ROOT

SHIPPED = "recipes/study/builtin.yaml"
ALIGNMENTS = ("helpful", "harmless", "honest")


@pytest.fixture(scope="module")
def whole() -> Plan:
    return plan_study(load_study(SHIPPED))


def write(folder: Path, **values: object) -> Path:
    """A study of the demo's recipes, copied so that they can be changed."""
    for path in (ROOT / "recipes/demo").glob("*.yaml"):
        text = path.read_text()
        (folder / path.name).write_text(text)
    recipe = folder / "study.yaml"
    recipe.write_text(yaml.safe_dump({"recipes": str(folder), **values}))
    return recipe


def own_suite(folder: Path, **changed: dict[str, Any]) -> Path:
    """A suite of held-out records of each alignment, and of questions."""
    tasks = {a: {"kind": "nll", "file": f"{a}.jsonl", "heldout_share": 0.1, "alignment": a} for a in ALIGNMENTS}
    tasks["questions"] = {"kind": "choices", "file": "questions.jsonl"}
    suite = folder / "suite.yaml"
    tasks = {name: task | changed.get(name, {}) for name, task in tasks.items()}
    suite.write_text(yaml.safe_dump({"name": "own", "seed": 5, "tasks": tasks}))
    return suite


def own_data(folder: Path) -> Path:
    data = folder / "records"
    data.mkdir()
    for name in (*ALIGNMENTS, "questions"):
        (data / f"{name}.jsonl").write_text("{}")
    return data


def changed(folder: Path, recipe: Path, file: str, line: str) -> set[str]:
    """Names of the tasks that have another key when a line is added to a recipe."""
    plan = plan_study(load_study(recipe))
    before = keys_of(plan)
    with (folder / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    after = keys_of(plan_study(load_study(recipe)))
    return {name for name in before if before[name] != after[name]}


def test_all_that_the_question_needs_is_compared_once_a_seed(whole: Plan) -> None:
    names = {group: [m.name for m in whole.models if m.group == group] for group in (MIXTURE, MERGE, SEARCHED, RESM, FUSION)}
    assert len(names[MIXTURE]) == 3 + 3  # by size, balanced, in order, and the pairs of three
    assert {name.split("_helpful")[0].split("_harmless")[0] for name in names[MERGE]} == set(OPTIONS)
    assert names[SEARCHED] == [f"{name}_searched" for name in names[MERGE]]
    assert {"fused", "no_router_loss", "no_drift", "random_router", "resm_shared"} <= set(names[FUSION])
    assert {"resm_element_outliers", "resm_kappa_2", "resm_constant_rank", "resm_scaling_half"} <= set(names[RESM])
    for seed in (0, 1, 2):
        for model in whole.models:
            task = whole.task(f"seed-{seed}/scores/{model.group}")
            assert model.group == "ensemble" or f"seed-{seed}/{model.name}" in task.needs


def test_each_task_comes_after_what_it_needs_and_makes_what_no_other_does(whole: Plan) -> None:
    known: set[str] = set()
    for task in whole.tasks:
        assert set(task.needs) <= known, task.name
        known.add(task.name)
    made = [path for task in whole.tasks for path in task.makes]
    assert len(set(made)) == len(made)
    assert len(known) == len(whole.tasks)


@pytest.mark.parametrize("recipes", ["recipes/demo", "recipes/demo-data"])
def test_training_and_searching_never_see_the_test_records(recipes: str) -> None:
    for task in plan_study(load_study(SHIPPED, given={"recipes": recipes, "seeds": [0]})).tasks:
        words = [word for word in task.command if TEST in word and not word.startswith("data.hygiene.heldout=")]
        assert not words, task.command
        if task.tokens:
            recipe = load_recipe(TrainRecipe, task.command[2], task.command[3:])
            assert [source.path for source in recipe.data.records] == [TRAIN]
            assert recipe.data.hygiene.heldout in ([], [TEST, VALIDATION])
            assert bool(recipe.data.hygiene.heldout) == (recipes == "recipes/demo-data"), "what is written in the recipe was left"


def test_every_training_command_is_one_that_the_recipe_takes_and_seeds_differ(whole: Plan) -> None:
    seeds = set()
    for task in whole.tasks:
        if task.tokens:
            verb, path, *words = task.command[1:]
            recipe = load_recipe(TrainRecipe, path, words)
            assert (verb == "align") == (recipe.alignment is not None)
            assert task.tokens == recipe.steps * recipe.data.rows_per_batch * recipe.data.sequence_length
            seeds.add((task.name.split("/")[1], recipe.seed))
    bases = {seed for name, seed in seeds if name == "base"}
    assert len(bases) == 3


def test_the_mixtures_see_as_many_tokens_as_the_fused_model_and_all_that_it_is_made_of(whole: Plan) -> None:
    def tokens(name: str) -> int:
        return sum(task.tokens for task in whole.lineage(f"seed-0/{name}") if task.is_cost)

    assert {tokens(model.name) for model in whole.models if model.group == MIXTURE} == {tokens("fused")}
    assert tokens("ties") < tokens("fused")


def test_ordered_gives_each_alignment_a_third_of_the_steps(whole: Plan) -> None:
    path, *words = whole.task("seed-0/mixture_ordered").command[2:]
    recipe = load_recipe(TrainRecipe, path, words)
    assert recipe.data.schedule is not None
    assert [phase.from_step for phase in recipe.data.schedule] == [0, recipe.steps // 3, 2 * recipe.steps // 3]
    assert [max(phase.weights, key=lambda name: phase.weights[name]) for phase in recipe.data.schedule] == [
        "helpful",
        "harmless",
        "honest",
    ]


def test_a_changed_recipe_changes_the_keys_of_what_depends_on_it_and_no_others(tmp_path: Path) -> None:
    recipe = write(tmp_path, merges=["ties"], search=None, resm={}, mixtures=["balanced"], fusions={"fused": {}})
    found = changed(tmp_path, recipe, "train.yaml", "experts: loop")
    assert found == {"seed-0/fused.train", "seed-0/fused", "seed-0/scores/fusion"}
    found = changed(tmp_path, recipe, "fuse.yaml", "family: llama")
    assert found == {"seed-0/fused.fuse", "seed-0/fused.train", "seed-0/fused", "seed-0/scores/fusion"}
    found = changed(tmp_path, recipe, "mixture.yaml", "experts: loop")
    assert found == {"seed-0/mixture_balanced", "seed-0/scores/mixture"}
    found = changed(tmp_path, recipe, "base.yaml", "experts: loop")
    assert found == {task.name for task in plan_study(load_study(recipe)).tasks} - {"data", "split", "tokenizer"}
    assert not changed(tmp_path, recipe, "base.yaml", "# only a comment")


def test_another_version_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_study(load_study(write(tmp_path, merges=["ties"])))
    before = keys_of(plan)
    monkeypatch.setattr(ledger, "__version__", "0.0.0")
    assert not set(before.values()) & set(keys_of(plan).values())


def test_other_records_are_another_key_and_missing_ones_are_told_together(tmp_path: Path) -> None:
    data = tmp_path / "records"
    data.mkdir()
    recipe = write(tmp_path, data=str(data), merges=["ties"], suite=str(own_suite(tmp_path)))
    with pytest.raises(MissingInputError) as caught:
        plan_study(load_study(recipe))
    assert len(caught.value.findings) == 4
    for name in (*ALIGNMENTS, "questions"):
        (data / f"{name}.jsonl").write_text("{}")
    plan = plan_study(load_study(recipe))
    before = keys_of(plan)
    (data / "honest.jsonl").write_text("{} ")
    ledger.file_hash.cache_clear()
    assert not set(before.values()) & set(keys_of(plan).values())


def test_what_is_scored_is_what_is_held_out_and_training_keeps_away_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite's share and seed split the records; it is found from the study's folder, wherever its place was told from."""
    monkeypatch.chdir(tmp_path)
    data = own_data(tmp_path)
    own_suite(tmp_path)
    recipe = write(tmp_path, data=str(data), suite="suite.yaml", recipes="recipes/demo-data")
    plan = plan_study(load_study(recipe))
    assert {"--heldout-share=0.1", "--seed=5"} <= set(plan.task("data").command)
    assert "--seed=6" in plan.task("split").command
    (hygiene,) = [word for word in plan.task("seed-0/helpful").command if word.startswith("data.hygiene.heldout=")]
    assert yaml.safe_load(hygiene.partition("=")[2]) == [TEST, VALIDATION, str(data / "questions.jsonl")]
    command = plan.task("seed-0/scores/single").command
    assert command[command.index("--suite") + 1] == str(tmp_path / "suite.yaml")


def test_another_suite_scores_again_and_trains_nothing(tmp_path: Path) -> None:
    data, suite = own_data(tmp_path), own_suite(tmp_path)
    recipe = write(tmp_path, data=str(data), suite=str(suite), merges=["ties"], recipes="recipes/demo-data")
    before = keys_of(plan_study(load_study(recipe)))
    suite.write_text(suite.read_text().replace("name: own", "name: other"))
    ledger.file_hash.cache_clear()
    after = keys_of(plan_study(load_study(recipe)))
    assert {name.split("/")[1] for name in before if before[name] != after[name]} == {"scores"}


def test_the_suites_files_may_be_told_to_be_the_records_own(tmp_path: Path) -> None:
    """A suite that would score what is trained on is refused whichever way its folder was named."""
    data, suite = own_data(tmp_path), own_suite(tmp_path, honest={"heldout_share": None})
    (tmp_path / "link").symlink_to(data)
    for suite_data in (data, tmp_path / "link"):
        recipe = write(tmp_path, data=str(data), suite=str(suite), suite_data=str(suite_data))
        with pytest.raises(ConfigError, match="it must be given, and once for all"):
            plan_study(load_study(recipe))


def test_a_search_sees_no_source_that_is_not_scored(tmp_path: Path) -> None:
    suite = own_suite(tmp_path, honest={"exclude_source": ["template", "stub"]}, harmless={"exclude_source": ["stub"]})
    recipe = write(
        tmp_path, data=str(own_data(tmp_path)), suite=str(suite), recipes="recipes/demo-data", search={"methods": ["ties"]}
    )
    plan = plan_study(load_study(recipe))
    command = plan.task("seed-0/ties_searched").command
    assert [command[i + 1] for i, word in enumerate(command) if word == "--exclude-source"] == ["stub", "template"]
    assert "--exclude-source" not in plan.task("seed-0/ties").command


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ({"honest": {"alignment": "helpful"}}, "no task of kind nll of honest (a study compares by them)"),
        ({"honest": {"heldout_share": 0.2}}, "it must be given, and once for all (found: 0.1, 0.2)"),
        ({"honest": {"heldout_share": None}}, "it must be given, and once for all (found: 0.1, None)"),
    ],
)
def test_a_suite_that_would_score_what_was_trained_on_is_refused(tmp_path: Path, tasks: dict[str, Any], line: str) -> None:
    recipe = write(tmp_path, data=str(own_data(tmp_path)), suite=str(own_suite(tmp_path, **tasks)))
    with pytest.raises(ConfigError, match=re.escape(line)):
        plan_study(load_study(recipe))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"compare": [["resm", "best"]]}, "compare: best: no such model in this study (works: base, helpful"),
        ({"merge": ["ties"]}, "merge: unknown key (did you mean 'merges'?)"),
        ({"merges": ["tie"]}, "merges: ['tie']: tie: no such method (works: linear"),
        ({"merges": ["ties"], "search": {"methods": ["resm"]}}, "search.methods: resm is not among merges (works: ties)"),
        ({"search": {"records_per_alignment": 65}}, "search.records_per_alignment: 65: Input should be less than or equal to 64"),
        ({"main": "best"}, "main: 'best' is no fusion (works: fused"),
        ({"resm": {"x": ["outlier_kapa=1"]}}, "resm.x: outlier_kapa: unknown key (did you mean 'outlier_kappa'?)"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: one is given twice"),
        ({"fusions": {"a b": {}, "fused": {}}}, "'a b': no name of a model"),
        ({"fusions": {"fused": {"train": ["stpes=3"]}}}, "stpes: unknown key (did you mean 'steps'?)"),
        ({"fusions": {"fused": {"fuse": ["top_k=9"]}}}, "top_k: 9 of 4 experts (works: 1 to 4)"),
        ({"fusions": {"fused": {}, "ties": {}}}, "two models are called ties"),
        ({"recipes": "nowhere"}, "nowhere/tokenizer.yaml: no such file"),
    ],
)
def test_a_bad_recipe_is_told_before_anything_runs(tmp_path: Path, values: dict[str, object], line: str) -> None:
    with pytest.raises((ConfigError, MissingInputError)) as caught:
        plan_study(load_study(write(tmp_path, **values)))
    assert line in str(caught.value)


def test_quick_changes_what_its_section_says_and_has_to_be_there(tmp_path: Path) -> None:
    quick, slow = load_study(SHIPPED, quick=True), load_study(SHIPPED)
    assert (len(quick.seeds), len(slow.seeds)) == (1, 3)
    assert slow.merges == StudyRecipe(recipes="x").merges
    with pytest.raises(ConfigError, match="quick: is required by --quick"):
        load_study(write(tmp_path), quick=True)


def test_recipes_of_ones_own_are_found_from_the_studys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "study.yaml").write_text(f"recipes: {tmp_path.name}")
    found = load_study(tmp_path / "study.yaml")
    assert Path(found.recipes) == tmp_path.resolve()
    assert load_study(SHIPPED).recipes == "recipes/demo"
