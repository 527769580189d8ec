"""What share of the tokens each alignment has at each step. Shape suffix: A alignments."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from h3scale.config.data import Data
from h3scale.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """Shares of 1 by alignment from each of some steps on, and how many records of each alignment may be taken.

    shares: (from_step, (A,) float64) in growing order, the first from step 0. max_records: (A,) int64, -1 for no limit.
    """

    alignments: tuple[str, ...]
    shares: tuple[tuple[int, np.ndarray], ...]
    max_records: np.ndarray

    def at(self, step: int) -> np.ndarray:
        """Shares at this step, (A,)."""
        return next(shares for from_step, shares in reversed(self.shares) if from_step <= step)


def mixture(data: Data, alignments: Sequence[str], tokens_A: np.ndarray, records_A: np.ndarray) -> Mixture:
    """The mixture that a recipe asks for, of alignments with so many tokens and records.

    Raises ConfigError (78) for weights or limits of alignments that are not there, and for alignments without a weight.
    """
    findings = []
    if data.schedule:
        phases = [(phase.from_step, phase.weights) for phase in data.schedule]
    elif data.weights:
        phases = [(0, data.weights)]
    else:
        power = 0.0 if data.temperature is None else 1 / data.temperature
        sizes = np.asarray(tokens_A, np.float64) / max(int(np.max(tokens_A)), 1)
        phases = [(0, dict(zip(alignments, (sizes**power).round(9).tolist(), strict=True)))]
    known = ", ".join(alignments)
    key = "data.schedule" if data.schedule else "data.weights"
    for from_step, weights in phases:
        findings += [f"{key}: from step {from_step}: '{a}' has no records (works: {known})" for a in set(weights) - set(alignments)]
        findings += [f"{key}: from step {from_step}: no weight for '{a}' (0 leaves it out)" for a in alignments if a not in weights]
    limits = data.max_epochs if isinstance(data.max_epochs, dict) else dict.fromkeys(alignments, data.max_epochs)
    findings += [f"data.max_epochs: '{a}' has no records (works: {known})" for a in limits if a not in alignments]
    if findings:
        raise ConfigError(sorted(findings))
    shares = []
    for from_step, weights in phases:
        weights_A = np.array([weights[a] for a in alignments], np.float64)
        shares.append((from_step, weights_A / weights_A.sum()))
    epochs = [limits.get(a) for a in alignments]
    max_records = [-1 if epoch is None else max(1, int(epoch * n)) for epoch, n in zip(epochs, records_A, strict=True)]
    return Mixture(tuple(alignments), tuple(shares), np.array(max_records, np.int64))
