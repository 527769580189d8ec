"""Suites against lm-evaluation-harness: the package (make test-lm-eval), and everywhere its definitions written down plainly."""

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml

from h3scale.data.builtin import RECORDS_DIR
from h3scale.data.sources import read_records
from h3scale.data.tokenizer import train_tokenizer
from h3scale.evaluation.suite import load_suite, score_suite
from h3scale.model.tiny import tiny_config

TEMPLATE = "Q: {prompt}\nA:"
CLOSE = 1e-4
SUITE = {
    "which": {"kind": "choices", "file": "choices.jsonl", "limit": 40},
    "rather": {"kind": "pairs", "file": "pairs.jsonl", "limit": 40},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(read_records([RECORDS_DIR / "heldout.jsonl"]), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, and lively enough that answers differ by more than rounding."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama", vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None, eos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, 0, 0.3)
    return model.float().eval()


def scores(model, tokenizer, folder, template):
    more = {"template": template} if template else {}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "parity", "tasks": {name: {**task, **more} for name, task in SUITE.items()}}))
    loaded = load_suite(path, RECORDS_DIR)
    result = score_suite(model, tokenizer, loaded)
    assert result["notes"] == []
    return {score["metric"]: score["mean"] for score in result["scores"]}, {n: [i.id for i in loaded.asked[n]] for n in SUITE}


def rows_of(name, ids):
    lines = (RECORDS_DIR / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(lines[int(i) - 1]) for i in ids]


class Harness:
    """`loglikelihood` of lm_eval/models/huggingface.py and api/model.py, a row at a time in fp64."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def log_likelihood(self, context, continuation):
        num_blanks = len(context) - len(context.rstrip())
        if num_blanks > 0:
            continuation, context = context[-num_blanks:] + continuation, context[:-num_blanks]
        whole = self.tokenizer.encode(context + continuation)
        start = len(self.tokenizer.encode(context))
        with torch.no_grad():
            logits = self.model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].double()
        return sum(logits.log_softmax(-1)[at - 1, whole[at]].item() for at in range(start, len(whole)))

    def multiple_choice(self, context, delimiter, choices, gold):
        """acc and acc_norm of process_results for output_type multiple_choice (api/task.py), and the log-likelihoods."""
        found = np.array([self.log_likelihood(context, f"{delimiter}{choice}") for choice in choices])
        lengths = np.array([float(len(choice)) for choice in choices])
        return float(found.argmax() == gold), float((found / lengths).argmax() == gold), found


def mass_of_the_true(log_likelihoods, labels):
    """process_results_mc2 of lm_eval/tasks/truthfulqa/utils.py."""
    probs = np.exp(log_likelihoods)
    return (probs / probs.sum())[np.array(labels) == 1].sum()


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["plain", "chat"])
def test_scores_are_what_the_harness_defines(model, tokenizer, tmp_path, template):
    found, ids = scores(model, tokenizer, tmp_path, template)
    harness = Harness(model, tokenizer)
    expected = {name: [] for name in ("mc1", "mc2", "accuracy", "accuracy_per_char")}

    def asked(prompt):
        if template:
            return TEMPLATE.replace("{prompt}", prompt), " "
        said = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True), ""

    for row in rows_of("choices", ids["which"]):
        expected["mc1"].append(harness.multiple_choice(*asked(row["question"]), row["mc1_choices"], row["mc1_label"])[0])
        *_, sums = harness.multiple_choice(*asked(row["question"]), row["mc2_choices"], 0)
        expected["mc2"].append(mass_of_the_true(sums, row["mc2_labels"]))
    for row in rows_of("pairs", ids["rather"]):
        whole, by_char, _ = harness.multiple_choice(*asked(row["prompt"]), [row["chosen"], row["rejected"]], 0)
        expected["accuracy"].append(whole)
        expected["accuracy_per_char"].append(by_char)
    means = {name: np.mean(values) for name, values in expected.items()}
    assert {name: found[name] for name in means} == pytest.approx(means, abs=CLOSE)
    assert all(0.02 < value < 0.98 for value in means.values())  # neither all right nor all wrong: there is something to see


@pytest.mark.lm_eval
@pytest.mark.skipif(
    find_spec("lm_eval") is None and os.environ.get("CI") != "true", reason="lm_eval is not installed (make test-lm-eval)"
)
def test_scores_equal_lm_evaluation_harness(model, tokenizer, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    found, ids = scores(model, tokenizer, tmp_path, TEMPLATE)
    questions = [
        {
            "question": row["question"],
            "mc1_targets": {"choices": row["mc1_choices"]},
            "mc2_targets": {"choices": row["mc2_choices"], "labels": row["mc2_labels"]},
        }
        for row in rows_of("choices", ids["which"])
    ]
    for name, rows in (("choices", questions), ("pairs", rows_of("pairs", ids["rather"]))):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name, file, **more):
        files = {"validation": str(tmp_path / f"{file}.json")}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
        metrics = {
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in more.pop("metrics")]
        }
        fixed = {"output_type": "multiple_choice", "validation_split": "validation", "num_fewshot": 0, "doc_to_target": 0}
        return {"task": name, **data, **metrics, **fixed, **more}

    asks = "Q: {{question}}\nA:"
    tasks = [  # the definitions of tasks/truthfulqa/truthfulqa_mc1.yaml and _mc2.yaml, but for the questions before the question
        task("mc1", "choices", doc_to_text=asks, doc_to_choice="{{mc1_targets.choices}}", metrics=["acc"]),
        task(
            "mc2",
            "choices",
            doc_to_text=asks,
            doc_to_choice="{{mc2_targets.choices}}",
            metrics=["acc"],
            process_results=process_results_mc2,
        ),
        task(
            "pairs", "pairs", doc_to_text="Q: {{prompt}}\nA:", doc_to_choice="{{[chosen, rejected]}}", metrics=["acc", "acc_norm"]
        ),
    ]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    theirs = simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0)["results"]
    assert found["mc1"] == pytest.approx(theirs["mc1"]["acc,none"], abs=CLOSE)
    assert found["mc2"] == pytest.approx(theirs["mc2"]["acc,none"], abs=CLOSE)
    assert found["accuracy"] == pytest.approx(theirs["pairs"]["acc,none"], abs=CLOSE)
    assert found["accuracy_per_char"] == pytest.approx(theirs["pairs"]["acc_norm,none"], abs=CLOSE)
