"""Several models asked for every token, as one model: what a merge of their weights stands in for.

Logits are averaged. A softmax takes no notice of a constant, so the mean of logits and the mean of log-probabilities give the
same distribution: the product of the models' probabilities to the power of 1 / models, scaled to sum 1. (The mean of their
probabilities would be another one.)
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from h3scale.errors import DataError
from h3scale.evaluation.evaluate import open_model
from h3scale.evaluation.suite import LoadedSuite, score_suite


class Ensemble(nn.Module):
    """Called as a transformers model is; `config` is the first model's."""

    def __init__(self, models: list[Any]):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config = models[0].config

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """`logits`: the mean of the models'."""
        logits = [model(**inputs).logits for model in self.models]
        return SimpleNamespace(logits=torch.stack(logits).mean(0))


def evaluate_ensemble(loaded: LoadedSuite, folders: list[Path], experts: str = "auto") -> dict[str, Any]:
    """The suite's result of the models together. DataError (65) where their tokenizers differ."""
    opened = [open_model(folder, experts) for folder in folders]
    first = opened[0][1].get_vocab()
    for folder, (_, tokenizer) in zip(folders, opened, strict=True):
        if tokenizer.get_vocab() != first:
            raise DataError(f"{folder}: its tokenizer is not that of {folders[0]} (an ensemble adds up logits of the same tokens)")
    return score_suite(Ensemble([model for model, _ in opened]).eval(), opened[0][1], loaded)
