"""The repository itself: what is shipped works, is fast to ask, and holds nothing of one machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from h3scale.config.base import load_recipe, load_yaml
from h3scale.config.fuse import FuseRecipe
from h3scale.config.merge import load_merge
from h3scale.config.recipe import TokenizerRecipe, TrainRecipe
from h3scale.config.study import load_study
from h3scale.config.suite import Suite
from h3scale.study.demo import ALIGNMENTS, Demo

ROOT = Path(__file__).parents[2]
SCHEMAS = {"tokenizer": TokenizerRecipe, "fuse": FuseRecipe}
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
VERBS = [
    "",
    "demo",
    "data builtin",
    "data split",
    "data tokenizer",
    "data prepare",
    "data adapters",
    "train",
    "align",
    "launch",
    "fuse",
    "merge",
    "evaluate",
    "generate",
    "report",
    "study",
]
VERBS += ["checkpoint consolidate", "checkpoint verify", "checkpoint release"]


def h3scale(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "h3scale.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    if path.parent.name == "suites":
        assert load_recipe(Suite, path)
    elif path.parent.name == "study":
        assert load_study(path, quick="quick" in load_yaml(path))
    elif "method" in load_yaml(path):
        assert load_merge(path, {}, [])[0].models
    else:
        assert load_recipe(SCHEMAS.get(path.stem, TrainRecipe), path)


@pytest.mark.parametrize("folder", ["demo", "demo-quick", "demo-data"])
def test_the_mixture_control_sees_as_many_tokens_as_align_and_train_together(folder: str) -> None:
    def tokens(name: str) -> int:
        recipe = load_recipe(TrainRecipe, ROOT / "recipes" / folder / f"{name}.yaml")
        return recipe.steps * recipe.data.rows_per_batch * recipe.data.sequence_length

    assert tokens("mixture") == len(ALIGNMENTS) * tokens("align") + tokens("train")


def test_the_demo_runs_only_verbs_and_recipes_that_exist() -> None:
    for demo in (Demo(None, 2, False), Demo(None, 2, True), Demo(Path("x"), 2, False)):
        for step in demo.steps():
            for word in step.command:
                if word.startswith("recipes/"):
                    assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = h3scale(*verb.split(), "--help")
    assert done.returncode == 0
    assert not verb or "Example: h3scale " in " ".join(done.stdout.split())


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, h3scale.cli.main; print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["train", "nowhere.yaml"], 66, "error: nowhere.yaml: no such file"),
        (["train", "recipes/demo/base.yaml", "stpes=3"], 78, "stpes: unknown key (did you mean 'steps'?)"),
        (["align", "recipes/demo/align.yaml"], 78, "alignment: is required to align"),
        (["demo", "--data", "nowhere"], 66, "helpful.jsonl: no such file"),
        (["demo", "--out", "full"], 73, "full: exists already"),
        (["demo", "--ranks", "3"], 78, "3 processes cannot share the demo's four experts"),
        (["demo", "--quick", "--data", "full"], 2, "--quick uses the built-in records"),
        (["data", "builtin", "full"], 73, "full: exists already"),
        (["demo", "--out", "full", "--force"], 77, "full: not made by h3scale demo"),
        (["train", "recipes/demo/base.yaml", "steps=[1"], 78, "'steps=[1': the value is not valid YAML"),
        (["train", "recipes/demo/base.yaml", "steps=many"], 78, "steps: 'many': Input should be a valid integer"),
        (["train", "recipes/demo/base.yaml", "architecture.num_attention_heads=3"], 78, "hidden_size: 128 must be a multiple of"),
        (["train", "recipes/demo/base.yaml", "ranks=1"], 66, "tokenizer: no such folder"),
        (["train", "recipes/demo/align.yaml", "ranks=1"], 66, "models/base: no such model folder"),
        (["train", "recipes/demo/base.yaml", "ranks=1", "out=."], 77, "out: . holds tokenizer, data/train.jsonl"),
        (["data", "split", "full", "out"], 66, "helpful.jsonl: no such file"),
        (["launch", "recipes/demo/train.yaml", "--nodes", "3"], 78, "3 nodes x 2 ranks x rows_per_micro_batch = "),
        (["launch", "recipes/demo/train.yaml", "--hostfile", "hosts"], 2, "--hostfile: no machines are known"),
        (["launch", "recipes/demo/train.yaml", "--submit", "--print"], 2, "--submit: excludes --print"),
        (["merge"], 2, "merge: no models (works: MODEL MODEL --base BASE --method NAME --out DIR, or --recipe FILE)"),
        (["merge", "a", "a", "--base", "b", "--method", "ties", "--out", "o"], 78, "models.a (again): a is given twice, as a too"),
        (["merge", "a", "b", "--base", "c", "--method", "ties", "--out", "o", "density=2"], 78, "density: 2: Input should be less"),
        (["study", "recipes/study/3h.yaml", "--quick"], 78, "recipes/study/3h.yaml: quick: is required by --quick"),
        (["study", "recipes/study/builtin.yaml", "--out", "full"], 77, "full: not made by h3scale study"),
        (["study", "recipes/study/3h.yaml", "--data", "nowhere"], 66, "nowhere/helpful.jsonl: no such file"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_input_gives_a_line_and_its_exit_code(tmp_path: Path, words: list[str], code: int, line: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    done = h3scale(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert line in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"], "something half-written was left"


def test_nothing_in_the_tree_names_this_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        assert not re.search(r"(^|[^\w./])/(work|root|farm)/\w", text), name


def test_the_pins_that_matter_are_pinned() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    assert pins["deepspeed"] == "0.19.8"
    assert pins["torch"] == "2.13.0"
    assert (5, 17) <= tuple(int(part) for part in pins["transformers"].split(".")[:2]) < (5, 23)


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {reference["url"].rsplit("/", 1)[-1] for reference in citation["references"]} == {"2411.17792", "2502.06876"}
