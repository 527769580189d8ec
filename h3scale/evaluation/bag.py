"""How far words alone go: a bag-of-words classifier of the alignment, the yardstick for a router's accuracy.

Multinomial logistic regression on tf-idf of token ids, prompt and response together: it sees whole records, as the
router's vote over a record does, but no order of words and no model.

Shape suffixes: N records, V vocabulary, A alignments.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h3scale.data.encode import Encoded
from h3scale.errors import DataError
from h3scale.model.accuracy import share_correct

L2 = 1e-5  # times the squared weights, beside a mean loss; 3e-6 to 3e-5 differ by 0.2 points on the 3H records
MAX_ITERATIONS = 200


def bag_accuracy(train: Sequence[Encoded], heldout: Sequence[Encoded], l2: float = L2) -> dict[str, Any]:
    """{"accuracy": {ALIGNMENT: share}, "macro"} on the held-out records of a classifier fitted on the others.

    Alignments weigh equally in the fit. Raises DataError (65) when a held-out alignment has no train record.
    """
    alignments = list(dict.fromkeys(item.record.alignment for item in train))
    strange = sorted({item.record.alignment for item in heldout} - set(alignments))
    if strange:
        raise DataError(f"bag of words: no train record of {', '.join(strange)}")
    vocab_size = 1 + max((max(item.input_ids) for item in (*train, *heldout)), default=0)
    counts_train, counts_heldout = _counts(train, vocab_size), _counts(heldout, vocab_size)
    weights_V = _idf(counts_train, len(train), vocab_size)
    labels_N = torch.tensor([alignments.index(item.record.alignment) for item in train])
    weight_VA, bias_A = fit(_tf_idf(counts_train, weights_V), labels_N, len(alignments), l2)
    logits_NA = _sparse(*_tf_idf(counts_heldout, weights_V)) @ weight_VA + bias_A
    truth_N = torch.tensor([alignments.index(item.record.alignment) for item in heldout])
    shares = share_correct(logits_NA, truth_N, len(alignments))
    accuracy = {a: share for a, share in zip(alignments, shares, strict=True) if share is not None}
    return {"accuracy": accuracy, "macro": sum(accuracy.values()) / len(accuracy)}


Rows = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]  # CSR: row starts, columns, values, shape


def fit(features: Rows, labels_N: Tensor, num_alignments: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (V, A) and bias (A,) of the least class-balanced cross entropy + l2 * |weights|^2, by L-BFGS in fp32."""
    features_NV, features_VN = _sparse(*features), _sparse(*_transposed(features))
    num_records, vocab_size = features[3]
    parameters = torch.zeros(vocab_size + 1, num_alignments, requires_grad=True)
    share_N = 1.0 / (num_alignments * torch.bincount(labels_N, minlength=num_alignments))[labels_N]
    rows = torch.arange(num_records)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=MAX_ITERATIONS, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        with torch.no_grad():
            weight_VA, bias_A = parameters[:-1], parameters[-1]
            log_probs_NA = (features_NV @ weight_VA + bias_A).log_softmax(-1)
            error_NA = log_probs_NA.exp()
            error_NA[rows, labels_N] -= 1
            error_NA *= share_N.unsqueeze(-1)
            parameters.grad = torch.cat([features_VN @ error_NA + 2 * l2 * weight_VA, error_NA.sum(0, keepdim=True)])
            return -(log_probs_NA[rows, labels_N] * share_N).sum() + l2 * weight_VA.square().sum()

    optimizer.step(closure)
    fitted = parameters.detach()
    return fitted[:-1], fitted[-1]


def _counts(encoded: Sequence[Encoded], vocab_size: int) -> Rows:
    """How often each record has each token."""
    pairs = [np.unique(np.asarray(item.input_ids, np.int64), return_counts=True) for item in encoded]
    starts = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    columns = np.concatenate([ids for ids, _ in pairs]) if pairs else np.zeros(0, np.int64)
    values = np.concatenate([counts for _, counts in pairs]) if pairs else np.zeros(0)
    return starts, columns, values.astype(np.float32), (len(encoded), vocab_size)


def _idf(counts: Rows, num_records: int, vocab_size: int) -> np.ndarray:
    """Smoothed: ln((1 + records) / (1 + records with the token)) + 1."""
    with_token_V = np.bincount(counts[1], minlength=vocab_size)
    return (np.log((1 + num_records) / (1 + with_token_V)) + 1).astype(np.float32)


def _tf_idf(counts: Rows, weights_V: np.ndarray) -> Rows:
    """(1 + ln(count)) * idf, each row scaled to length 1."""
    starts, columns, values, shape = counts
    weighted = (1 + np.log(values)) * weights_V[columns]
    rows = np.repeat(np.arange(shape[0]), np.diff(starts))
    lengths_N = np.sqrt(np.bincount(rows, weighted**2, minlength=shape[0]))
    return starts, columns, (weighted / lengths_N[rows]).astype(np.float32), shape


def _transposed(matrix: Rows) -> Rows:
    starts, columns, values, (num_rows, num_columns) = matrix
    rows = np.repeat(np.arange(num_rows), np.diff(starts))
    order = np.argsort(columns, kind="stable")
    new_starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=num_columns))])
    return new_starts, rows[order], values[order], (num_columns, num_rows)


def _sparse(starts: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta feature
        return torch.sparse_csr_tensor(torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(values), shape)
