"""A release is verified, says what it is, has checksums, and leaves the maker's machine behind."""

import json
import subprocess

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.receipt import RECEIPT
from h3scale.checkpoint.release import model_card, release
from h3scale.checkpoint.shards import read_json
from h3scale.cli.checkpoint import app
from h3scale.errors import ConfigError, DataError, MissingInputError, OutputError, UnsafeError
from tests.unit.checkpoint.planted_faults import edit_json

SCORES = {
    "nll": {
        "helpful": {"nll": 1.2345, "low": 1.1, "high": 1.3, "records": 40},
        "harmless": {"nll": 0.5},
    },
    "router": {"accuracy": {"helpful": 0.975, "harmless": 1.0}, "macro": 0.9875},
    "exact_match": {"helpful": {"exact": 0.8}},
}


@pytest.fixture
def folder(shard, tmp_path):
    """A consolidated model in two shards or more."""
    consolidate(shard(), tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES))
    return path


def test_a_release_loads_with_plain_transformers_and_computes_the_same(folder, probe, tmp_path):
    release(folder, tmp_path / "out", license="apache-2.0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"], position_ids=probe["position_ids"], use_cache=False).logits
    assert torch.equal(logits, probe["logits"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_the_card_says_what_the_hub_and_people_need(folder, evaluation, tmp_path):
    release(folder, tmp_path / "h3-tiny", license="apache-2.0", base_model=["me/base"], evaluation=evaluation)
    card = ModelCard.load(tmp_path / "h3-tiny" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["me/base"]
    assert card.data.tags == ["merge", "moe", "mixtral", "h3fusion"]
    assert card.data.library_name == "transformers"
    for text in ("# h3-tiny", "arxiv.org/abs/2411.17792", 'AutoModelForCausalLM.from_pretrained("h3-tiny")'):
        assert text in card.text
    assert [line for line in card.text.splitlines() if line.startswith(("| 0 ", "| 3 "))] == [
        "| 0 | helpful | helpful |",
        "| 3 | general | none (general) |",
    ]


def test_the_card_of_a_dense_model_claims_no_fusion():
    text = model_card({"model_type": "llama"}, "honest-7b", "mit", "me/base", None)
    assert ModelCard(text).data.tags == ["llama", "h3fusion"]
    assert "A llama model" in text
    assert "Base: me/base." in text
    assert "expert" not in text


def test_the_card_has_the_scores_as_they_were_measured(folder, evaluation, tmp_path):
    release(folder, tmp_path / "out", license="mit", evaluation=evaluation)
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    start = lines.index("| alignment | NLL | 95% interval | records | router accuracy | exact match |")
    assert lines[start + 2 : start + 4] == [
        "| helpful | 1.234 | 1.100 to 1.300 | 40 | 97.5% | 80.0% |",
        "| harmless | 0.500 |  |  | 100.0% | |",
    ]


SUITE = {
    "suite": "my | suite",
    "seed": 0,
    "scores": [
        {
            "task": "heldout",
            "metric": "nll",
            "alignment": "helpful",
            "mean": 1.5,
            "low": 1.25,
            "high": 1.75,
            "items": 40,
            "groups": 40,
        },
        {
            "task": "a|b",
            "metric": "accuracy",
            "alignment": None,
            "mean": 0.9,
            "low": 0.8001,
            "high": 1.0,
            "items": 60,
            "groups": 59,
        },
    ],
    "items": {},
    "notes": [],
}
ROWS = ["| heldout | helpful | nll | 1.500 | 1.250 to 1.750 | 40 |", "| a\\|b |  | accuracy | 0.900 | 0.800 to 1.000 | 60 |"]


@pytest.mark.parametrize("more", [{}, SCORES], ids=["alone", "beside records"])
def test_the_card_has_a_suite_s_scores_with_their_intervals(folder, tmp_path, more):
    (tmp_path / "scores.json").write_text(json.dumps({"suite": SUITE, **more}))
    release(folder, tmp_path / "out", license="mit", evaluation=tmp_path / "scores.json")
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    start = lines.index("| task | alignment | metric | mean | 95% interval | items |")
    assert lines[start + 2 : start + 4] == ROWS
    assert lines.count("## Evaluation") == 1
    assert any("Suite my \\| suite: what the model finds likely" in line for line in lines)
    assert ("| helpful | 1.234 | 1.100 to 1.300 | 40 | 97.5% | 80.0% |" in lines) is bool(more)
    assert any("Held-out records." in line for line in lines) is bool(more)


def test_without_scores_the_card_claims_none(folder, tmp_path):
    release(folder, tmp_path / "out", license="mit")
    assert "Evaluation" not in (tmp_path / "out" / "README.md").read_text()


def test_sha256sum_accepts_the_release_and_finds_a_change(folder, tmp_path):
    out = release(folder, tmp_path / "out", license="mit")
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    check = ["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=out, capture_output=True).returncode == 0
    with (out / "README.md").open("a") as file:
        file.write(" ")
    assert subprocess.run(check, cwd=out, capture_output=True).returncode == 1


def test_remote_code_local_paths_and_stray_files_stay_behind(folder, tmp_path):
    (folder / RECEIPT).unlink()
    for name in ("config.json", "tokenizer_config.json"):
        values = read_json(folder / name) | {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "/home/me/secret"}
        (folder / name).write_text(json.dumps(values))
    (folder / "training_args.bin").write_bytes(b"pickle")
    out = release(folder, tmp_path / "out", license="mit")
    for name in ("config.json", "tokenizer_config.json"):
        assert not {"auto_map", "_name_or_path"} & read_json(out / name).keys()
        assert read_json(out / name).keys() >= read_json(folder / name).keys() - {"auto_map", "_name_or_path"}
    assert "h3scale" in read_json(out / "config.json")
    assert not (out / "training_args.bin").exists()


def test_all_may_read_the_published_files(folder, tmp_path):
    out = release(folder, tmp_path / "out", license="mit")
    assert {path.name: path.stat().st_mode & 0o444 for path in out.iterdir() if path.stat().st_mode & 0o444 != 0o444} == {}


@pytest.mark.parametrize("license", ["", "Apache License 2", "mit\nbase_model: evil"])
def test_without_a_license_identifier_nothing_is_written(folder, tmp_path, license):
    with pytest.raises(ConfigError, match="license"):
        release(folder, tmp_path / "out", license=license)
    assert not (tmp_path / "out").exists()


def test_a_broken_model_is_not_released(folder, tmp_path):
    shard = sorted(folder.glob("*.safetensors"))[0]
    values = bytearray(shard.read_bytes())
    values[-1] ^= 1
    shard.write_bytes(values)
    with pytest.raises(DataError, match="sha256 differs"):
        release(folder, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()


def test_scores_of_another_form_are_refused(folder, tmp_path):
    broken = {**SUITE, "scores": [{**SUITE["scores"][0], "mean": None}]}
    for other in ({"nll": {"helpful": 1.0}}, {}, {"suite": "3h"}, {"suite": broken}, {**SCORES, "suite": broken}):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match="not the JSON of"):
            release(folder, tmp_path / "out", license="mit", evaluation=tmp_path / "other.json")
    with pytest.raises(MissingInputError):
        release(folder, tmp_path / "out", license="mit", evaluation=tmp_path / "nowhere.json")


def test_a_release_that_exists_is_kept_without_force(folder, tmp_path):
    out = release(folder, tmp_path / "out", license="mit")
    with pytest.raises(OutputError):
        release(folder, out, license="apache-2.0")
    assert ModelCard.load(out / "README.md").data.license == "mit"
    release(folder, out, license="apache-2.0", force=True)
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"


def test_the_command_asks_for_a_license_and_says_where_the_release_is(folder, tmp_path):
    without = CliRunner().invoke(app, ["release", str(folder), str(tmp_path / "out")])
    assert isinstance(without.exception, ConfigError)
    done = CliRunner().invoke(app, ["release", str(folder), str(tmp_path / "out"), "--license", "mit", "--base-model", "me/base"])
    assert done.exit_code == 0, done.output
    assert done.output.strip().splitlines()[-1].startswith(f"release: {tmp_path / 'out'}   next: h3scale generate")


def test_the_card_shows_a_conversation_as_the_chat_template_writes_it(folder, tmp_path):
    template = "{% for turn in messages %}<{{ turn.role }}>\n{{ turn.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / RECEIPT).unlink()
    card = (release(folder, tmp_path / "out", license="mit") / "README.md").read_text()
    assert "(user: hello, assistant: world) so:\n\n    <user>\n    hello\n    <assistant>\n    world\n" in card


def test_what_is_unsafe_and_not_left_out_is_not_released(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(UnsafeError, match="sandbox"):
        release(folder, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()


def test_a_special_token_is_no_secret_whatever_the_environment_calls_its_own(folder, tmp_path, monkeypatch):
    token = "<|end_of_turn|>"
    edit_json(folder / "generation_config.json", stop_strings=[token])
    (folder / RECEIPT).unlink()
    monkeypatch.setenv("EOT_TOKEN", token)
    release(folder, tmp_path / "out", license="mit")
    assert read_json(tmp_path / "out" / "generation_config.json")["stop_strings"] == [token]
