"""The router's start against references written out in full, and the hidden states that it is fitted on."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from h3scale.config.fuse import FuseRecipe, RouterStart
from h3scale.data.encode import Encoded, encode_records
from h3scale.data.records import Record
from h3scale.data.sources import read_records
from h3scale.errors import DataError, MissingInputError
from h3scale.fusion import router_init
from h3scale.fusion.execute import choose_records, fuse
from h3scale.fusion.router_init import (
    cut,
    expert_rows,
    fit_router,
    oracle_pass,
    part_copies,
    random_rows,
    router_accuracy,
    set_routers,
)
from h3scale.fusion.solve import Logistic, PromptMean, Ridge, best_scale, golden_section
from h3scale.model.experts import ExpertMap
from h3scale.model.router import alignment_log_probs, membership_AE
from h3scale.model.start import load_model, load_tokenizer
from tests.tiny import tiny_aligned, tiny_llama, tiny_records

LABELS = ("a", "b", "c")
H = 6


def hidden(counts=(40, 25, 70), seed=0):
    """Tokens of three alignments, unequally many, around different means, with a common part as real states have."""
    generator = torch.Generator().manual_seed(seed)
    means_AH = torch.randn(len(counts), H, generator=generator, dtype=torch.float64) + 2
    return [mean + torch.randn(n, H, generator=generator, dtype=torch.float64) for mean, n in zip(means_AH, counts, strict=True)]


def feed(solver, tokens, layer=0, pieces=1, prompt=None):
    for alignment_id, hidden_TH in enumerate(tokens):
        for piece in hidden_TH.chunk(pieces):
            is_prompt_T = torch.ones(len(piece), dtype=torch.bool) if prompt is None else prompt(piece)
            solver.add(layer, alignment_id, piece, is_prompt_T)


def ridge_rows(tokens, ridge=0.05, pieces=1):
    solver = Ridge(1, [len(h) for h in tokens], ridge)
    feed(solver, tokens, pieces=pieces)
    return solver.rows()[0]


def reference_ridge(tokens, ridge):
    """The normal equations with X, C and Y written out, solved by least squares on the augmented system."""
    X_TH = torch.cat(tokens)
    Y_TA = torch.cat([torch.eye(3, dtype=torch.float64)[a].expand(len(h), 3) for a, h in enumerate(tokens)]) - 1 / 3
    C_T = torch.cat([torch.full((len(h),), 1 / len(h), dtype=torch.float64) for h in tokens])
    penalty = ridge * (X_TH.T @ torch.diag(C_T) @ X_TH).trace() / H
    X_aug = torch.cat([C_T.sqrt()[:, None] * X_TH, penalty.sqrt() * torch.eye(H, dtype=torch.float64)])
    Y_aug = torch.cat([C_T.sqrt()[:, None] * Y_TA, torch.zeros(H, 3, dtype=torch.float64)])
    return torch.linalg.lstsq(X_aug, Y_aug).solution.T


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("pieces", [1, 4])
def test_ridge_is_the_weighted_least_squares_solution(ridge, pieces):
    found_AH = ridge_rows(hidden(), ridge, pieces)
    torch.testing.assert_close(found_AH, reference_ridge(hidden(), ridge), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_AH.sum(0), torch.zeros(H, dtype=torch.float64), rtol=0, atol=1e-12)


def test_ridge_weighs_alignments_and_not_tokens():
    tokens = hidden()
    repeated = [tokens[0], tokens[1].repeat(7, 1), tokens[2]]
    torch.testing.assert_close(ridge_rows(repeated), ridge_rows(tokens))


def test_ridge_means_the_same_at_every_size_of_the_hidden_states():
    tokens = hidden()
    larger = [100 * h for h in tokens]
    torch.testing.assert_close(100 * ridge_rows(larger), ridge_rows(tokens))


def test_ridge_keeps_the_layers_apart():
    first, second = hidden(seed=1), hidden(seed=2)
    solver = Ridge(2, [len(h) for h in first], 0.05)
    feed(solver, first, layer=0)
    feed(solver, second, layer=1)
    for found, tokens in zip(solver.rows(), (first, second), strict=True):
        torch.testing.assert_close(found, reference_ridge(tokens, 0.05))


def test_logistic_is_where_its_gradient_vanishes():
    tokens, ridge = [h.float().double() for h in hidden()], 0.05  # it keeps fp32
    solver = Logistic(1, 3, ridge)
    feed(solver, tokens, pieces=3)
    found_AH = solver.rows()[0].requires_grad_()
    penalty = ridge * sum(h.square().sum() / len(h) for h in tokens) / 3 / H
    nll = sum(-(h @ found_AH.T).log_softmax(-1)[:, a].mean() for a, h in enumerate(tokens)) / 3
    (nll + 0.5 * penalty * found_AH.square().sum()).backward()
    assert found_AH.grad.abs().max() < 1e-6
    assert nll.item() < 0.8 * math.log(3)


def test_prompt_mean_looks_at_prompts_only():
    tokens = hidden()
    solver = PromptMean(1, 3)
    feed(solver, tokens, pieces=2, prompt=lambda piece: piece[:, 0] > 2)
    means_AH = torch.stack([torch.cat([p[p[:, 0] > 2] for p in h.chunk(2)]).mean(0) for h in tokens])
    directions_AH = means_AH - means_AH.mean(0)
    directions_AH /= directions_AH.norm(dim=1, keepdim=True)
    torch.testing.assert_close(solver.rows()[0], directions_AH - directions_AH.mean(0))


@pytest.mark.parametrize("factor", [0.01, 1.0, 250.0])
def test_best_scale_has_the_lowest_nll_of_all_scales(factor):
    expert_map = ExpertMap(LABELS, ("a", "b", "c", None))
    generator = torch.Generator().manual_seed(3)
    logits = [[torch.randn(n, 4, generator=generator) for n in (30, 20, 10)] for _ in range(2)]
    for by_alignment in logits:
        for alignment_id, logits_TE in enumerate(by_alignment):
            logits_TE[:, alignment_id] += 0.8
            logits_TE *= factor

    def nll(scale):
        parts = [-alignment_log_probs(t * scale, membership_AE(expert_map))[:, a].mean() for by in logits for a, t in enumerate(by)]
        return torch.stack(parts).mean().item()

    scale, at_scale = best_scale(logits, membership_AE(expert_map))
    assert at_scale == pytest.approx(nll(scale), abs=1e-6)
    assert at_scale < math.log(3)
    assert min(nll(scale * 1.05**k) for k in range(-60, 60)) > at_scale - 1e-5


def test_golden_section_finds_the_valley_wherever_it_lies():
    for lowest in (-3.0, 0.1, 4.9):
        assert golden_section(lambda x, lowest=lowest: abs(x - lowest), -3, 5) == pytest.approx(lowest, abs=2e-3)


def test_experts_of_one_alignment_share_a_row_and_general_ones_have_zeros():
    rows_AH = torch.arange(6.0).reshape(2, 3) + 1
    rows_EH = expert_rows(rows_AH, ExpertMap(("a", "b"), ("b", None, "a", "b")))
    assert rows_EH.tolist() == [[4, 5, 6], [0, 0, 0], [1, 2, 3], [4, 5, 6]]


def test_copies_move_apart_by_a_share_of_the_rows_length_and_their_mean_stays():
    expert_map = ExpertMap(("a", "b"), ("a", "a", "a", "b", None, None))
    rows_EH = expert_rows(torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64), expert_map)
    found_EH = part_copies(rows_EH, expert_map, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(found_EH[3], rows_EH[3])  # an expert without a copy
    length = rows_EH[:4].norm(dim=1).square().mean().sqrt()
    for copies in ([0, 1, 2], [4, 5]):
        moved_CH = found_EH[copies] - rows_EH[copies]
        torch.testing.assert_close(moved_CH.mean(0), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(moved_CH.norm(dim=1).square().mean().sqrt(), 0.25 * length)
        assert moved_CH.norm(dim=1).min() > 0.1 * length
    assert torch.equal(found_EH, part_copies(rows_EH, expert_map, 0.25, torch.Generator().manual_seed(0)))
    assert not torch.equal(found_EH, part_copies(rows_EH, expert_map, 0.25, torch.Generator().manual_seed(1)))


def test_only_rows_that_were_moved_apart_let_training_part_the_copies(tmp_path):
    """With equal rows, copies of one FFN get equal gradients, step after step; with the recipe's noise they do not."""
    base = tiny_llama(tmp_path / "base")
    models = {label: str(tiny_aligned(tmp_path / label, base, seed=i + 1)) for i, label in enumerate(LABELS)}
    records = tiny_records(tmp_path / "records.jsonl", LABELS)
    recipe = {"base": str(base), "models": models, "experts_per_alignment": 2, "general_experts": 2, "top_k": 4}
    recipe |= {"out": str(tmp_path / "fused"), "router": {"records": [str(records)]}}
    fuse(FuseRecipe.model_validate(recipe))
    encoded = encode_records(load_tokenizer(tmp_path / "fused"), read_records([records]))
    parted = copies_distance(load_model(tmp_path / "fused"), encoded)
    model = load_model(tmp_path / "fused")
    expert_map = ExpertMap.from_config(model.config)
    equal_LEH = []
    for router in router_init.router_modules(model):
        pairs = router.weight.detach().view(-1, 2, router.weight.shape[1])
        equal_LEH.append(pairs.mean(1).repeat_interleave(2, 0))
    set_routers(model, equal_LEH)
    equal = copies_distance(model, encoded)
    assert len(expert_map.experts) == 2 * len(equal)
    assert max(equal) < 1e-3
    assert min(parted) > 0.05


def copies_distance(model, encoded, steps=5):
    """After some steps: how far two copies are from each other, as a share of how far they went; one number a pair."""
    weights = model.model.layers[0].mlp.experts.down_proj
    start_EHI = weights.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([item.input_ids for item in encoded])
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (weights.detach() - start_EHI).flatten(1)
    return [((one - other).norm() / (one.norm() + other.norm())).item() for one, other in moved.view(-1, 2, moved.shape[1])]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fused model with its parts, and its encoded records."""
    root = tmp_path_factory.mktemp("made")
    base = tiny_llama(root / "base")
    models = {label: tiny_aligned(root / label, base, seed=i + 1) for i, label in enumerate(LABELS)}
    records = tiny_records(root / "records.jsonl", LABELS, per_alignment=8)
    paths = {label: str(path) for label, path in models.items()}
    out = str(root / "fused")
    fuse(FuseRecipe.model_validate({"base": str(base), "models": paths, "out": out, "router": {"init": "random"}}))
    model = load_model(out).eval()
    encoded = encode_records(load_tokenizer(out), read_records([records]))
    # Records of unequal length, so that rows are padded and several records share one.
    encoded = [e.cut(12 - i % 4) for i, e in enumerate(encoded)]
    return {"model": model, "map": ExpertMap(LABELS, (*LABELS, None)), "models": models, "encoded": encoded}


def collect(made, encoded):
    """What oracle_pass hands out: {(layer, alignment): tokens}, and the same for the prompt flags."""
    states, flags = {}, {}

    def use(layer, alignment_id, hidden_TH, is_prompt_T):
        states.setdefault((layer, LABELS[alignment_id]), []).append(hidden_TH)
        flags.setdefault((layer, LABELS[alignment_id]), []).append(is_prompt_T)

    oracle_pass(made["model"], made["map"], encoded, use)
    return {k: torch.cat(v) for k, v in states.items()}, {k: torch.cat(v) for k, v in flags.items()}


@pytest.mark.parametrize("row_tokens", [1, 27, 512])
def test_the_router_sees_what_the_aligned_model_alone_would_show_it(made, row_tokens, monkeypatch):
    """Packed, under oracle routing: the same states as each record by itself in its own dense model, no padding."""
    monkeypatch.setattr(router_init, "ROW_TOKENS", row_tokens)
    states, flags = collect(made, made["encoded"])
    for label, folder in made["models"].items():
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        own = [e for e in made["encoded"] if e.record.alignment == label]
        for layer in range(2):
            seen = []
            norm = dense.model.layers[layer].post_attention_layernorm
            handle = norm.register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output[0]))
            with torch.no_grad():
                for item in own:
                    dense(input_ids=torch.tensor([item.input_ids]))
            handle.remove()
            found_TH, wanted_TH = states[layer, label], torch.cat(seen).double()
            assert found_TH.dtype == torch.float64
            assert found_TH.shape == wanted_TH.shape
            # Packing changes the order of the records, so tokens are compared as a set: nearest neighbours.
            distances = torch.cdist(found_TH, wanted_TH)
            assert max(distances.min(0).values.max(), distances.min(1).values.max()) < 1e-4
            assert int(flags[layer, label].sum()) == sum(e.num_prompt_tokens for e in own)


def test_what_the_routers_hold_plays_no_part_in_the_fit(made):
    start = RouterStart(init="ridge", records=["-"])
    fits = []
    for seed in (1, 2):
        set_routers(made["model"], random_rows(made["model"], made["map"], seed))
        fits.append(fit_router(made["model"], made["map"], made["encoded"], made["encoded"], start))
    for one, other in zip(fits[0].weights_LEH, fits[1].weights_LEH, strict=True):
        assert torch.equal(one, other)
    assert fits[0].token_nll < 0.5 * math.log(3)


def test_one_scale_for_all_layers_and_rows(made):
    start = RouterStart(init="ridge", records=["-"])
    found = fit_router(made["model"], made["map"], made["encoded"], made["encoded"], start)
    states, _ = collect(made, made["encoded"])
    for layer, weights_EH in enumerate(found.weights_LEH):
        wanted_AH = reference_ridge_at(start.ridge, [states[layer, label] for label in LABELS])
        torch.testing.assert_close(weights_EH[:3] / found.scale, wanted_AH, rtol=1e-6, atol=1e-9)


def reference_ridge_at(ridge, tokens):
    solver = Ridge(1, [len(h) for h in tokens], ridge)
    feed(solver, tokens)
    return solver.rows()[0]


def test_random_rows_are_seeded_and_as_wide_as_the_initializer_range(made):
    one, again, other = (random_rows(made["model"], made["map"], seed) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])
    assert torch.stack(one).std().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize(("seed", "row_tokens"), [(0, 512), (1, 512), (2, 27)])
def test_router_accuracy_is_what_counting_record_by_record_gives(made, seed, row_tokens, monkeypatch):
    monkeypatch.setattr(router_init, "ROW_TOKENS", row_tokens)
    model = made["model"]
    set_routers(model, random_rows(model, made["map"], seed))
    right = dict.fromkeys(LABELS, 0)
    for item in made["encoded"]:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([item.input_ids]), output_router_logits=True)
        scores_A = sum(logits[item.num_prompt_tokens :, :3].log_softmax(-1).sum(0) for logits in output.router_logits)
        right[item.record.alignment] += LABELS[int(scores_A.argmax())] == item.record.alignment
    found = router_accuracy(model, made["encoded"], made["map"])
    assert found == pytest.approx({label: count / 8 for label, count in right.items()})
    assert 0 < sum(right.values()) < 24


def test_accuracy_leaves_out_what_has_no_response_or_no_label(made):
    item = made["encoded"][0]
    bare = item.cut(item.num_prompt_tokens)
    foreign = Encoded(Record("x", "other", "p", "r"), item.tokens)
    assert router_accuracy(made["model"], [bare, foreign], made["map"]) == {"a": None, "b": None, "c": None}


def test_cut_keeps_the_beginning():
    item = Encoded.of(Record("x", "a", "p", "r"), [5, 6, 7, 8], 3)
    assert [(e.input_ids, e.num_prompt_tokens) for e in cut([item], 2)] == [([5, 6], 2)]
    assert cut([item], 9)[0].input_ids == item.input_ids


def start_for(path, **changes):
    return RouterStart.model_validate({"records": [str(path)], **changes})


def test_fit_and_scale_records_never_share_an_instruction(tmp_path):
    path = tiny_records(tmp_path / "r.jsonl", LABELS, per_alignment=40)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *(line.replace('"id": "', '"id": "again-') for line in lines)]))
    chosen = choose_records(start_for(path, records_per_alignment=60), LABELS)
    for label in LABELS:
        fit, held = ([r for r in part if r.alignment == label] for part in (chosen.fit, chosen.held))
        assert len(fit) + len(held) == 60
        assert fit
        assert held
        assert not {r.prompt for r in fit} & {r.prompt for r in held}
    assert chosen.measure == chosen.held


def test_the_choice_of_records_is_the_seeds_alone(tmp_path):
    path = tiny_records(tmp_path / "r.jsonl", LABELS, per_alignment=40)
    picks = [choose_records(start_for(path, records_per_alignment=9, seed=seed), LABELS) for seed in (1, 1, 2)]
    assert picks[0] == picks[1]
    assert picks[0] != picks[2]


def test_one_instruction_for_all_records_is_still_cut_in_two(tmp_path):
    path = tmp_path / "r.jsonl"
    line = '{{"id": "{}{}", "alignment": "{}", "prompt": "same", "response": "r"}}\n'
    path.write_text("".join(line.format(label, i, label) for label in LABELS for i in range(8)))
    chosen = choose_records(start_for(path), LABELS)
    assert (len(chosen.fit), len(chosen.held)) == (18, 6)


def test_alignments_without_enough_records_are_all_named(tmp_path):
    path = tiny_records(tmp_path / "r.jsonl", ("a", "b"), per_alignment=1)
    with pytest.raises(DataError, match="alignment 'c' has no records"):
        choose_records(start_for(path), LABELS)
    with pytest.raises(DataError) as caught:
        choose_records(start_for(path), ("a", "b"))
    assert len(caught.value.findings) == 2
    assert "'b' has 1 record (works: 2 or more)" in caught.value.findings[1]
    with pytest.raises(MissingInputError):
        choose_records(start_for(tmp_path / "none.jsonl"), LABELS)
