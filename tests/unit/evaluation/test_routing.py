"""Router accuracy of routers made by hand is what their hands say; forced routes do what their names say."""

import pytest
import torch

from h3scale.data.collate import collate
from h3scale.data.encode import encode_records
from h3scale.data.store import Tokens
from h3scale.errors import DataError, UsageError
from h3scale.evaluation.evaluate import Options, evaluate_model
from h3scale.evaluation.routing import RoutingTally, route_for
from h3scale.evaluation.score import score_encoded
from h3scale.model.experts import ExpertMap

from .conftest import THREE, make_moe, make_records

FIVE = ExpertMap(("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e", "a", "b", "c", "d", "e"))
TWO = ExpertMap(("left", "right"), ("left", None, "right"))


def tallied(tokenizer, records, expert_map, logits_of, num_layers=3, top_k=2):
    """A tally of router logits that a rule gives: logits_of(layer, label, role) -> (E,) list."""
    encoded = encode_records(tokenizer, records)
    rows = [[i] for i in range(len(records))]
    batch = collate(rows, Tokens.of(encoded, expert_map.alignments), 32, pad_id=0)
    labels_T, roles_T = batch.alignment_ids.flatten().tolist(), batch.roles.flatten().tolist()
    router_logits = [
        torch.tensor([logits_of(layer, label, role) for label, role in zip(labels_T, roles_T, strict=True)]).float()
        for layer in range(num_layers)
    ]
    tally = RoutingTally(expert_map, encoded, top_k)
    tally.observe(router_logits, batch)
    return tally.summarise(range(len(records))), encoded


@pytest.mark.parametrize("expert_map", [THREE, TWO, FIVE], ids=["three", "two", "five"])
def test_a_perfect_router_is_always_right(tokenizer, expert_map):
    def logits_of(_layer, label, _role):
        return [5.0 if label >= 0 and expert == expert_map.alignments[label] else 0.0 for expert in expert_map.experts]

    records = make_records(expert_map.alignments, 4)
    found, _ = tallied(tokenizer, records, expert_map, logits_of)
    ones = dict.fromkeys(expert_map.alignments, 1.0)
    assert found["accuracy"] == found["per_token"]["accuracy"] == found["last_prompt_token"]["accuracy"] == ones
    assert found["macro"] == 1.0
    assert [layer["macro"] for layer in found["per_layer"]] == [1.0] * 3
    assert found["confusion"] == {a: {b: 4 * (a == b) for b in expert_map.alignments} for a in expert_map.alignments}


def test_every_measure_looks_where_it_says(tokenizer, records):
    """Layer 0 right at the prompt and wrong (always harmless) in the response, layer 1 right in the response, but weaker."""

    def logits_of(layer, label, role):
        target = label if (layer == 0) == (role == 1) else 1
        strength = 2.0 if layer == 0 else 1.0
        return [strength if expert == target else 0.0 for expert in range(4)]

    found, _ = tallied(tokenizer, records, THREE, logits_of, num_layers=2)
    always_harmless = {"helpful": 0.0, "harmless": 1.0, "honest": 0.0}
    assert found["accuracy"] == always_harmless
    assert found["macro"] == pytest.approx(1 / 3)
    assert found["per_token"]["accuracy"] == always_harmless
    assert [layer["macro"] for layer in found["per_layer"]] == [pytest.approx(1 / 3), 1.0]
    assert found["last_prompt_token"]["macro"] == 1.0
    assert found["confusion"]["honest"] == {"helpful": 0, "harmless": 6, "honest": 0}


def test_load_counts_top_k_of_real_tokens(tokenizer, records):
    """The label's expert first, the general one (id 3) second, whatever the layer; padding would choose expert 0."""

    def logits_of(_layer, label, role):
        if role == 0:
            return [9.0, 0.0, 0.0, 0.0]
        return [5.0 if expert == label else 4.0 if expert == 3 else 0.0 for expert in range(4)]

    found, encoded = tallied(tokenizer, records, THREE, logits_of)
    for label, alignment in enumerate(THREE.alignments):
        tokens = 3 * sum(len(item.input_ids) for item in encoded if item.record.alignment == alignment)
        expected = dict.fromkeys(THREE.names(), 0) | {THREE.names()[label]: tokens, "general": tokens}
        assert found["tokens_per_expert"][alignment] == expected
    assert sum(found["load_per_layer"][0].values()) == pytest.approx(1)
    assert found["load_per_layer"][0]["general"] == pytest.approx(0.5)


def test_batches_add_up_and_match_the_model(moe, tokenizer, records):
    """A tally over packed batches of the real model equals its routers' logits on each record alone."""
    encoded = encode_records(tokenizer, records)
    result, _ = evaluate_model(moe, tokenizer, encoded)
    right = dict.fromkeys(THREE.alignments, 0)
    chosen = dict.fromkeys(THREE.alignments, 0)
    for item in encoded:
        with torch.no_grad():
            logits = torch.stack(moe(input_ids=torch.tensor([item.input_ids]), output_router_logits=True).router_logits)
        votes = logits[:, item.num_prompt_tokens :, :3].log_softmax(-1).sum((0, 1))
        right[item.record.alignment] += THREE.alignments[votes.argmax()] == item.record.alignment
        chosen[item.record.alignment] += (logits.topk(2).indices == 0).sum().item()
    assert result["router"]["accuracy"] == {a: hits / 6 for a, hits in right.items()}
    assert {a: load["helpful"] for a, load in result["router"]["tokens_per_expert"].items()} == chosen
    assert 0 < sum(right.values()) < len(records)  # random routers: neither all right nor all wrong


def test_alignments_the_model_does_not_know_do_not_count(tokenizer):
    records = make_records(("helpful", "strange"), 3)
    model = make_moe(tokenizer, THREE)
    result, _ = evaluate_model(model, tokenizer, encode_records(tokenizer, records))
    assert set(result["nll"]) == {"helpful", "strange"}
    assert set(result["router"]["accuracy"]) == {"helpful"}


def test_oracle_runs_the_records_own_expert_alone(moe, tokenizer, records):
    """NLL under the oracle equals that of a dense model whose FFN is the expert."""
    from transformers import LlamaConfig, LlamaForCausalLM

    encoded = encode_records(tokenizer, records)
    scores = score_encoded(
        moe,
        encoded,
        route=route_for(moe, THREE, "oracle", [item.record.alignment for item in encoded]),
        alignments=THREE.alignments,
    )
    config = {k: v for k, v in moe.config.to_dict().items() if k not in ("model_type", "architectures")}
    state = moe.state_dict()
    for label, alignment in enumerate(THREE.alignments):
        dense = LlamaForCausalLM(LlamaConfig(**config)).eval()
        own = {name: value for name, value in state.items() if ".mlp." not in name}
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp."
            gate_up = state[prefix + "experts.gate_up_proj"][label]
            own[prefix + "gate_proj.weight"], own[prefix + "up_proj.weight"] = gate_up.chunk(2)
            own[prefix + "down_proj.weight"] = state[prefix + "experts.down_proj"][label]
        dense.load_state_dict(own)
        mine = [item for item in encoded if item.record.alignment == alignment]
        expected = [item.nll_sum for item in score_encoded(dense, mine).records]
        found = [item.nll_sum for item in scores.records if item.alignment == alignment]
        assert found == pytest.approx(expected, abs=1e-4)


def test_uniform_does_not_depend_on_the_router(tokenizer, records):
    encoded = encode_records(tokenizer, records)
    model = make_moe(tokenizer, THREE, seed=3)
    trained, _ = evaluate_model(model, tokenizer, encoded)
    before, _ = evaluate_model(model, tokenizer, encoded, Options(router="uniform"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.neg_()
    after, _ = evaluate_model(model, tokenizer, encoded, Options(router="uniform"))
    retrained, _ = evaluate_model(model, tokenizer, encoded)
    assert before["nll"] == after["nll"]
    assert trained["nll"] != retrained["nll"]
    assert trained["nll"] != before["nll"]
    assert "tokens_per_expert" in trained["router"]
    assert "tokens_per_expert" not in before["router"]


def test_forced_routes_need_a_router_and_an_expert(dense, moe, tokenizer):
    encoded = encode_records(tokenizer, make_records(("strange",), 1))
    with pytest.raises(UsageError, match="dense"):
        route_for(dense, None, "uniform")
    with pytest.raises(DataError, match="no expert for strange"):
        route_for(moe, THREE, "oracle", [item.record.alignment for item in encoded])
    with pytest.raises(UsageError, match="none of trained, uniform, oracle"):
        Options(router="best")
