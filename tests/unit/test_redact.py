"""Keys and passwords are hidden, and nothing else is."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from h3scale import log
from h3scale.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from h3scale.checkpoint.shards import write_json
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.exit_status import EXIT_STATUS, write_exit_status
from h3scale.redact import HIDDEN, without_secrets
from h3scale.train.resume import identity_of

SHAPED = {
    "hf_" + "aB3" * 11: HIDDEN,
    "https://me:pa55word@host/records.jsonl": f"https://{HIDDEN}@host/records.jsonl",
    "ghp_" + "x1Y2" * 9: HIDDEN,
    "sk-proj-" + "q7" * 12: HIDDEN,
    "Authorization: Bearer abcdef123456": f"Authorization: Bearer {HIDDEN}",
}
PLAIN = ["hf_tiny", "models/hf_model", "https://host/a:b@c", "a" * 40, "tokens", "sk-learn", "step-000120", "1e-5"]
OWN = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("text", SHAPED)
def test_what_has_the_shape_of_a_key_is_hidden(text: str) -> None:
    assert without_secrets({"a": [f"x {text}", 1, None]}) == {"a": [f"x {SHAPED[text]}", 1, None]}


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_looks_a_little_like_one_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD"])
def test_the_value_of_a_variable_that_is_called_a_secret_is_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, OWN)
    assert without_secrets(f"run {OWN}!") == f"run {HIDDEN}!"


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENIZERS_PARALLELISM", "unlikely"), ("HF_TOKEN", "short"), ("HF_TOKEN_PATH", "/home/me/token")]
)
def test_other_variables_hide_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"run {value}!") == f"run {value}!"


def test_no_file_that_a_run_writes_has_a_key_of_its_environment_or_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", OWN)
    shaped = next(iter(SHAPED))
    recipe = load_recipe(TrainRecipe, "recipes/demo/base.yaml", [f"tracking.wandb={shaped}"])
    identity: Any = identity_of(recipe.model_copy(update={"tokenizer": f"https://me:{OWN}@host"}))
    write_manifest(tmp_path, {"identity": identity, "more": OWN})
    write_json(tmp_path / "run.json", {"command": f"x {shaped}"})
    write_exit_status(tmp_path, 74, f"{OWN} is refused", 0, 1)
    monkeypatch.setattr(log, "logger", logging.getLogger("h3scale.test"))
    with log.libraries_to_file() as aside:
        aside.open(tmp_path / "logs" / "rank-0.log")
        print(f"wandb: {OWN} {shaped}")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {MANIFEST, "run.json", EXIT_STATUS, "rank-0.log"}
    for path in files:
        assert HIDDEN in path.read_text()
        assert OWN not in path.read_text()
        assert shaped not in path.read_text()
    assert read_manifest(tmp_path)["identity"] == json.loads(json.dumps(identity))  # and what is compared is alike
