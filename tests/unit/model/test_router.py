"""Law 5: what the router loss rewards, what it leaves alone, and who votes."""

import math

import pytest
import torch

from h3scale.model.accuracy import record_log_probs, share_correct
from h3scale.model.experts import ExpertMap
from h3scale.model.router import (
    alignment_log_probs,
    balance_loss_sum,
    expert_weights,
    first_choices,
    membership_AE,
    router_loss_sum,
    z_loss_sum,
)

TWO = ExpertMap(("a", "b"), ("a", "b"))
THREE = ExpertMap(("a", "b", "c"), ("a", "b", "c", None))
PAIRS = ExpertMap(("a", "b"), ("b", "a", None, "a", "b"))
UNEVEN = ExpertMap(("a", "b"), ("a", None, "a", "b"))
FIVE = ExpertMap(tuple("abcde"), (*"edcba", None, None))
MAPS = [TWO, THREE, PAIRS, FIVE]


def random_logits(expert_map, num_tokens=7, num_layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_tokens, expert_map.num_experts)
    return 2 * torch.randn(shape, generator=generator)


def labels_for(expert_map, num_tokens=7):
    return torch.arange(num_tokens) % len(expert_map.alignments)


@pytest.mark.parametrize("expert_map", [*MAPS, UNEVEN])
def test_log_probs_are_a_softmax_over_the_labelled_experts_summed_by_alignment(expert_map):
    logits_TE = random_logits(expert_map)[0]
    for logits_E, found_A in zip(logits_TE, alignment_log_probs(logits_TE, membership_AE(expert_map)), strict=True):
        scores = [math.exp(value) for value in logits_E.tolist()]
        total = sum(scores[i] for i in expert_map.labelled)
        wanted = [math.log(sum(scores[i] for i in expert_map.experts_of(a)) / total) for a in expert_map.alignments]
        assert found_A.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("expert_map", MAPS)
def test_perfect_routing_costs_nothing(expert_map):
    labels_T = labels_for(expert_map)
    perfect_TE = 80.0 * membership_AE(expert_map)[labels_T].float()
    loss = router_loss_sum(torch.stack([perfect_TE] * 2), labels_T, torch.ones(7, dtype=torch.bool), membership_AE(expert_map))
    assert 0 <= loss.item() < 1e-6


@pytest.mark.parametrize("expert_map", MAPS)
def test_uniform_routing_costs_the_log_of_the_number_of_alignments(expert_map):
    uniform_TE = torch.full((7, expert_map.num_experts), 0.3)
    votes_T = torch.ones(7, dtype=torch.bool)
    loss = router_loss_sum(torch.stack([uniform_TE] * 2), labels_for(expert_map), votes_T, membership_AE(expert_map))
    assert loss.item() / 7 == pytest.approx(math.log(len(expert_map.alignments)), abs=1e-6)


def test_a_layer_that_errs_is_not_made_good_by_another():
    labels_T = torch.zeros(1, dtype=torch.long)
    right, wrong = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 20.0]])
    votes_T = torch.ones(1, dtype=torch.bool)
    loss = router_loss_sum(torch.stack([right, wrong]), labels_T, votes_T, membership_AE(TWO))
    assert loss.item() == pytest.approx(10.0, abs=1e-4)


@pytest.mark.parametrize("expert_map", [THREE, PAIRS, UNEVEN, FIVE])
def test_general_experts_are_neither_rewarded_nor_pushed_away(expert_map):
    logits = [logits_TE.requires_grad_() for logits_TE in random_logits(expert_map)]
    labels_T, votes_T = labels_for(expert_map), torch.ones(7, dtype=torch.bool)
    loss = router_loss_sum(torch.stack(logits), labels_T, votes_T, membership_AE(expert_map))
    loss.backward()
    general = [i for i in range(expert_map.num_experts) if i not in expert_map.labelled]
    for logits_TE in logits:
        assert logits_TE.grad[:, general].abs().max() == 0
        assert logits_TE.grad[:, expert_map.labelled].abs().min() > 0
    moved = torch.stack(logits).detach()
    moved[:, :, general] += 30
    assert router_loss_sum(moved, labels_T, votes_T, membership_AE(expert_map)).item() == loss.item()


def test_padding_never_votes():
    member_AE, labels_T = membership_AE(THREE), labels_for(THREE)
    votes_T = torch.tensor([True, True, False, True, False, False, True])
    logits = [logits_TE.requires_grad_() for logits_TE in random_logits(THREE)]
    loss = router_loss_sum(torch.stack(logits), labels_T, votes_T, member_AE)
    loss.backward()
    for logits_TE in logits:
        assert logits_TE.grad[~votes_T].abs().max() == 0
    kept = torch.stack(logits).detach()[:, votes_T]
    alone = router_loss_sum(kept, labels_T[votes_T], torch.ones(4, dtype=torch.bool), member_AE)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)


def test_padding_may_carry_any_label_and_any_logit():
    member_AE, labels_T = membership_AE(THREE), labels_for(THREE)
    logits, votes_T = random_logits(THREE), torch.ones(7, dtype=torch.bool)
    wanted = router_loss_sum(logits, labels_T, votes_T, member_AE)
    padded = torch.cat([logits, torch.full((3, 5, 4), 1e4)], dim=1)
    labels_T = torch.cat([labels_T, torch.full((5,), -1)])
    votes_T = torch.cat([votes_T, torch.zeros(5, dtype=torch.bool)])
    assert router_loss_sum(padded, labels_T, votes_T, member_AE).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_half_precision_logits_are_scored_in_fp32():
    logits_TE = random_logits(THREE)[0].to(torch.bfloat16)
    found = alignment_log_probs(logits_TE, membership_AE(THREE))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, alignment_log_probs(logits_TE.float(), membership_AE(THREE)), rtol=0, atol=0)


def test_record_log_probs_are_summed_over_layers_and_response_tokens_of_each_record():
    logits, member_AE = random_logits(THREE), membership_AE(THREE)
    record_ids_T = torch.tensor([1, 1, 1, 0, 0, -1, -1])
    response_T = torch.tensor([False, True, True, False, True, False, False])
    found_RA = record_log_probs(logits, record_ids_T, response_T, member_AE, num_records=3)
    wanted_RA = torch.zeros(3, 3)
    for logits_TE in logits:
        for token, record in ((1, 1), (2, 1), (4, 0)):
            wanted_RA[record] += alignment_log_probs(logits_TE[token], member_AE)
    torch.testing.assert_close(found_RA, wanted_RA)
    assert found_RA[2].tolist() == [0, 0, 0]


def test_share_correct_counts_each_alignment_by_itself():
    log_probs_RA = torch.tensor([[0.0, -1, -2], [-1, 0, -2], [-3, 0, -2], [-1, 0, -2]])
    assert share_correct(log_probs_RA, torch.tensor([0, 0, 1, -1]), 3) == [0.5, 1.0, None]


def test_oracle_weights_are_shared_by_the_experts_of_an_alignment():
    assert expert_weights(PAIRS, "a").tolist() == [0, 0.5, 0, 0.5, 0]
    assert expert_weights(THREE, "c").tolist() == [0, 0, 1, 0]


def test_the_z_loss_is_the_squared_logsumexp_of_voting_tokens_averaged_over_layers():
    logits, votes_T = random_logits(THREE), torch.tensor([True, True, False, True, False, False, True])
    squares = [
        math.log(sum(math.exp(value) for value in logits_E.tolist())) ** 2
        for logits_TE in logits
        for logits_E in logits_TE[votes_T]
    ]
    assert z_loss_sum(logits, votes_T).item() == pytest.approx(sum(squares) / len(logits), rel=1e-6)


def test_the_z_loss_keeps_low_precision_out():
    logits, votes_T = random_logits(THREE).to(torch.bfloat16), torch.ones(7, dtype=torch.bool)
    assert z_loss_sum(logits, votes_T).item() == z_loss_sum(logits.float(), votes_T).item()


def even_shares(expert_map, num_layers=3):
    sizes = [len(expert_map.experts_of(a)) if a else 1 for a in expert_map.experts]
    return torch.tensor([[float(a is not None) / n for a, n in zip(expert_map.experts, sizes, strict=True)]] * num_layers)


@pytest.mark.parametrize("expert_map", [PAIRS, UNEVEN])
def test_balance_costs_one_and_pushes_nowhere_where_the_last_batch_was_even(expert_map):
    logits = [x.requires_grad_() for x in random_logits(expert_map)]
    votes_T = torch.ones(7, dtype=torch.bool)
    loss = balance_loss_sum(
        torch.stack(logits), labels_for(expert_map), votes_T, membership_AE(expert_map), even_shares(expert_map)
    )
    loss.backward()
    assert loss.item() / 7 == pytest.approx(1, abs=1e-6)
    assert max(x.grad.abs().max().item() for x in logits) < 1e-6


def test_balance_lowers_the_expert_that_had_too_much_of_its_own_alignment_and_no_other():
    logits = [x.requires_grad_() for x in random_logits(PAIRS)]  # experts b, a, general, a, b
    labels_T, votes_T = labels_for(PAIRS), torch.tensor([True] * 6 + [False])
    shares_LE = torch.tensor([[0.5, 0.9, 0.0, 0.1, 0.5]] * 3)
    balance_loss_sum(torch.stack(logits), labels_T, votes_T, membership_AE(PAIRS), shares_LE).backward()
    is_a_T = (labels_T == 0) & votes_T
    for logits_TE in logits:
        assert (logits_TE.grad[is_a_T, 1] > 0).all()
        assert (logits_TE.grad[is_a_T, 3] < 0).all()
        assert logits_TE.grad[is_a_T][:, [0, 2, 4]].abs().max() == 0
        assert logits_TE.grad[~is_a_T].abs().max() < 1e-6  # b was even, padding does not vote


@pytest.mark.parametrize("expert_map", [PAIRS, UNEVEN, THREE])
def test_first_choices_count_voting_tokens_among_the_experts_of_their_alignment(expert_map):
    logits, labels_T = random_logits(expert_map), labels_for(expert_map).clone()
    votes_T = torch.tensor([True, True, False, True, True, False, True])
    labels_T[~votes_T] = -1
    wanted_LE = torch.zeros(3, expert_map.num_experts, dtype=torch.float64)
    for layer, logits_TE in enumerate(logits):
        for t in votes_T.nonzero().flatten().tolist():
            mine = expert_map.experts_of(expert_map.alignments[labels_T[t]])
            wanted_LE[layer, max(mine, key=lambda e: logits_TE[t, e].item())] += 1
    assert torch.equal(first_choices(logits, labels_T, votes_T, membership_AE(expert_map)), wanted_LE)
