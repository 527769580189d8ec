"""The bag of words learns what words can tell, and nothing where they tell nothing."""

import numpy as np
import pytest
import torch

from h3scale.data.encode import Encoded
from h3scale.data.records import Record
from h3scale.errors import DataError
from h3scale.evaluation.bag import _counts, _idf, _sparse, _tf_idf, _transposed, bag_accuracy, fit


def encoded(alignment, ids):
    return Encoded.of(Record("r", alignment, "p", "r"), list(ids), 1)


def make(sizes, telling, seed=0, vocab=60, length=12):
    """Records of random tokens 10..59; a share `telling` of them also has its alignment's own token."""
    rng = np.random.default_rng(seed)
    found = []
    for label, (alignment, size) in enumerate(sizes.items()):
        for _ in range(size):
            ids = rng.integers(10, vocab, length).tolist()
            found.append(encoded(alignment, [*ids, label] if rng.random() < telling else ids))
    return found


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
def test_words_that_tell_are_learned(names):
    found = bag_accuracy(make(dict.fromkeys(names, 60), 1.0), make(dict.fromkeys(names, 30), 1.0, seed=1))
    assert list(found["accuracy"]) == list(names)
    assert found["macro"] == 1.0


def test_words_that_do_not_tell_give_chance():
    found = bag_accuracy(make(dict.fromkeys("abc", 100), 0.0), make(dict.fromkeys("abc", 100), 0.0, seed=1))
    assert 0.2 < found["macro"] < 0.47


def test_a_rare_alignment_weighs_as_much_as_a_common_one():
    train, heldout = make({"a": 500, "b": 25}, 0.5), make({"a": 200, "b": 200}, 0.5, seed=1)
    accuracy = bag_accuracy(train, heldout, l2=1e-2)["accuracy"]
    assert accuracy["b"] > 0.5  # unweighted, every record without a telling word would be called 'a'


def test_fit_reaches_the_minimum_that_autograd_sees():
    train = make({"a": 40, "b": 20, "c": 10}, 0.6)
    labels = torch.tensor(["abc".index(item.record.alignment) for item in train])
    counts = _counts(train, 60)
    features = _tf_idf(counts, _idf(counts, len(train), 60))
    weight, bias = fit(features, labels, 3, 1e-3)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    dense = _sparse(*features).to_dense().double()
    per_class = torch.stack(
        [torch.nn.functional.cross_entropy((dense @ weight + bias)[labels == c], labels[labels == c]) for c in range(3)]
    )
    (per_class.mean() + 1e-3 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


def test_features_and_transpose_by_hand():
    counts = _counts([encoded("a", [2, 2, 0]), encoded("b", [1])], 3)
    assert _sparse(*counts).to_dense().tolist() == [[1, 0, 2], [0, 1, 0]]
    assert _sparse(*_transposed(counts)).to_dense().tolist() == [[1, 0], [0, 1], [2, 0]]
    rows = _sparse(*_tf_idf(counts, np.ones(3, np.float32))).to_dense()
    assert torch.allclose(rows[0] / rows[0, 0], torch.tensor([1.0, 0.0, 1 + np.log(2)]).float())
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))


def test_an_alignment_without_train_records_is_named():
    with pytest.raises(DataError, match="no train record of b"):
        bag_accuracy(make({"a": 2}, 1.0), make({"b": 2}, 1.0))
