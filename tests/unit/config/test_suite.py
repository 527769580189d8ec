"""Suites that people write: what is wrong with one is said in a line, with what would work."""

from pathlib import Path

import pytest

from h3scale.config.base import checked, load_yaml
from h3scale.config.suite import Suite
from h3scale.errors import ConfigError

ROOT = Path(__file__).parents[3]
PAIRS = {"kind": "pairs", "file": "pairs.jsonl"}


def suite(**task):
    return {"name": "mine", "tasks": {"first": {**PAIRS, **task}}}


def test_a_suite_says_little_and_the_rest_has_defaults():
    task = checked(Suite, suite(), "mine.yaml").tasks["first"]
    assert (task.alignment, task.where, task.limit, task.template) == (None, {}, None, None)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid(path):
    assert checked(Suite, load_yaml(path), str(path)).name == path.stem


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        (suite(limt=3), "tasks.first.limt: unknown key (did you mean 'limit'?)"),
        (suite(kind="pair"), "tasks.first.kind: 'pair': Input should be 'nll', 'choices' or 'pairs'"),
        (suite(limit=0), "tasks.first.limit: 0: Input should be greater than or equal to 1"),
        (suite(file="../eval.jsonl"), "must be a file inside the folder"),
        (suite(file="/data/eval.jsonl"), "must be a file inside the folder"),
        (suite(template="Q:"), "tasks.first.template: 'Q:': {prompt} must stand in it once"),
        (suite(heldout_share=0.1), "heldout_share: a task of kind pairs has none (works for: nll)"),
        (suite(kind="nll", template="{prompt}"), "template: a task of kind nll has none (works for: choices, pairs)"),
        (suite(kind="nll", where={"a": "b"}), "where: a task of kind nll has none"),
        ({"name": "mine", "tasks": {}}, "tasks"),
        ({"tasks": suite()["tasks"]}, "mine.yaml: name: is required"),
        ({**suite(), "sed": 1}, "mine.yaml: sed: unknown key (did you mean 'seed'?)"),
    ],
)
def test_what_is_wrong_is_one_line(values, finding):
    with pytest.raises(ConfigError) as error:
        checked(Suite, values, "mine.yaml")
    assert len(error.value.findings) == 1
    assert finding in error.value.findings[0]
