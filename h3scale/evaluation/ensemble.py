"""Several models asked for every token, as one model: what a merge of their weights stands in for.

Logits are averaged. A softmax takes no notice of a constant, so the mean of logits and the mean of log-probabilities give the
same distribution: the product of the models' probabilities to the power of 1 / models, scaled to sum 1. (The mean of their
probabilities would be another one.)
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from h3scale.errors import DataError
from h3scale.evaluation.evaluate import read_model
from h3scale.evaluation.journal import kept
from h3scale.evaluation.run_suite import Asking, Scored, finished, tokenizer_of, work_for
from h3scale.evaluation.suite import LoadedSuite, Unit, score_unit
from h3scale.model.start import placed


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


def evaluate_ensemble(
    loaded: LoadedSuite, folders: Sequence[Path], experts: str = "auto", journal: Path | None = None
) -> dict[str, Any]:
    """The suite's result of the models together, in one process; `journal` as in `evaluate_suite`.

    DataError (65) where their tokenizers differ.
    """
    first, *others = (tokenizer_of(folder).get_vocab() for folder in folders)
    for folder, vocab in zip(folders[1:], others, strict=True):
        if vocab != first:
            raise DataError(f"{folder}: its tokenizer is not that of {folders[0]} (an ensemble adds up logits of the same tokens)")

    def scored(left: Sequence[Unit]) -> Scored:
        model = placed(Ensemble([read_model(folder, experts)[0] for folder in folders])).eval()
        for unit in left:
            yield unit, score_unit(model, unit, loaded.suite.tasks[unit.task])

    known = "+".join(Asking(folder, experts=experts).key() for folder in folders)
    with kept(journal) as notes:
        return finished(loaded, work_for(loaded, folders[0]), "ensemble", known, scored, notes)
