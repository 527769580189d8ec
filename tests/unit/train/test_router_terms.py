"""What is counted about routing, against a loop over tokens and layers."""

from collections import Counter

import pytest
import torch

from h3scale.model.experts import ExpertMap
from h3scale.model.router import membership_AE
from h3scale.train.metrics import expert_load
from h3scale.train.router_terms import routing_sums
from tests.router_case import MicroBatch

MAP = ExpertMap(("helpful", "harmless"), ("helpful", "harmless", None, "harmless"))
TOP_K = 2


def test_sums_are_those_of_a_loop_over_tokens_and_layers() -> None:
    torch.manual_seed(0)
    logits_LTE = torch.randn(3, 17, MAP.num_experts)
    labels_T = torch.arange(17) % 3 - 1  # -1 is padding
    votes_T = (labels_T >= 0) & (torch.arange(17) % 4 > 0)
    votes, right, loss = Counter[int](), Counter[int](), Counter[int]()
    taken = torch.zeros(3, MAP.num_experts, dtype=torch.float64)
    for t, label in enumerate(labels_T.tolist()):
        total = torch.zeros(len(MAP.alignments))
        for layer in range(3):
            logits = logits_LTE[layer, t]
            probs = logits[MAP.labelled].softmax(0)
            own = [MAP.experts[e] for e in MAP.labelled]
            log_probs = torch.stack([sum(p for p, x in zip(probs, own, strict=True) if x == a).log() for a in MAP.alignments])
            total += log_probs
            if label >= 0:
                for expert in logits.argsort(descending=True)[:TOP_K].tolist():
                    taken[layer, expert] += 1
            if votes_T[t]:
                loss[label] -= log_probs[label].item() / 3  # type: ignore[assignment]
        if votes_T[t]:
            votes[label] += 1
            right[label] += int(total.argmax().item() == label)
    sums = routing_sums(logits_LTE, labels_T, votes_T, membership_AE(MAP), TOP_K)
    assert sums["votes_A"].tolist() == [votes[0], votes[1]]
    assert sums["routed_A"].tolist() == [right[0], right[1]]
    torch.testing.assert_close(sums["router_A"], torch.tensor([loss[0], loss[1]]))
    assert torch.equal(sums["tokens_per_expert_LE"], taken)


def test_load_is_one_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    counts_LE = torch.tensor([[5.0, 5.0, 5.0], [0.0, 15.0, 0.0]], dtype=torch.float64)
    assert expert_load(counts_LE, ["a", "b", "c"]) == {
        "tokens_per_expert/a": 5,
        "tokens_per_expert/b": 20,
        "tokens_per_expert/c": 5,
        "load_max_over_mean": 2.0,
        "load_max_over_mean_worst_layer": 3.0,
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_layer_more_is_one_operation_more_autograds_sum_of_its_logits_gradients(family: str) -> None:
    few, many = (MicroBatch(family, num_layers, torch.float32).added_operations() for num_layers in (2, 8))
    print(few, many - few)
    assert many.total() - few.total() <= 8 - 2, many - few
