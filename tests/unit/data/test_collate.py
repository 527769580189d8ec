"""Packed rows as tensors: targets never cross records, and a packed record's logits are those it has alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from h3scale.data.collate import IGNORE, PADDING, PROMPT, RESPONSE, collate
from h3scale.data.encode import RESPONSE_BIT, Encoded
from h3scale.data.records import Record
from h3scale.data.store import Tokens

ALIGNMENTS = ("helpful", "harmless", "honest")


def single(alignment: str, ids: list[int], num_prompt_tokens: int) -> Encoded:
    return Encoded.of(Record("r", alignment, "p", "r"), ids, num_prompt_tokens)


def test_targets_are_the_next_tokens_of_the_response_and_never_of_another_record() -> None:
    records = Tokens.of([single("helpful", [10, 11, 12, 13, 14], 2), single("honest", [10, 11, 12, 13, 14, 15], 3)], ALIGNMENTS)
    batch = collate([[0, 1]], records, 12, pad_id=7)
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13, 14, 10, 11, 12, 13, 14, 15, 7]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]
    assert batch.targets[0].tolist() == [-100, 12, 13, 14, -100, -100, -100, 13, 14, 15, -100, -100]
    assert batch.record_ids[0].tolist() == [0] * 5 + [1] * 6 + [-1]
    assert batch.alignment_ids[0].tolist() == [0] * 5 + [2] * 6 + [-1]
    assert batch.roles[0].tolist() == [PROMPT] * 2 + [RESPONSE] * 3 + [PROMPT] * 3 + [RESPONSE] * 3 + [PADDING]


def test_all_turns_of_the_assistant_are_asked_for_and_nothing_else() -> None:
    flags = [0, 0, 1, 1, 0, 0, 0, 1]
    tokens = np.array([i + 10 | flag << RESPONSE_BIT for i, flag in enumerate(flags)], np.uint32)
    records = Tokens.of([Encoded(Record("r", "helpful", "p", "r"), tokens)], ALIGNMENTS)
    assert records.responses.tolist() == [3]
    batch = collate([[0]], records, 8, pad_id=0)
    assert batch.targets[0].tolist() == [IGNORE, 12, 13, IGNORE, IGNORE, IGNORE, 17, IGNORE]
    weighted = collate([[0]], records, 8, pad_id=0, prompt_weight=0.5)
    assert weighted.target_weights[0].tolist() == [0.5, 1, 1, 0.5, 0.5, 0.5, 1, 0]


def slow(rows: list[list[int]], encoded: list[Encoded], length: int, pad_id: int, prompt_weight: float) -> list[list]:
    """What collate does, a token at a time."""
    out = []
    for row in rows:
        for index in row:
            item = encoded[index]
            room = length - len(out) % length if len(out) % length or index == row[0] else 0
            ids, flags = item.input_ids[:room], (item.tokens >> RESPONSE_BIT).tolist()
            for i, token in enumerate(ids):
                last = i == len(ids) - 1
                weight = 0.0 if last else (1.0 if flags[i + 1] else prompt_weight)
                target = ids[i + 1] if weight else IGNORE
                label = ALIGNMENTS.index(item.record.alignment)
                out.append([token, i, target, weight, label, RESPONSE if flags[i] else PROMPT, index])
        out += [[pad_id, i, IGNORE, 0.0, -1, PADDING, -1] for i in range(-len(out) % length)]
    return out


@given(st.data(), st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([np.uint32, np.uint16]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_number_is_that_of_a_slow_reference(data, prompt_weight: float, dtype) -> None:
    encoded = []
    for _ in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.integers(1, 14))
        flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        tokens = np.array([5 + i | int(flag) << RESPONSE_BIT for i, flag in enumerate(flags)], np.uint32)
        encoded.append(Encoded(Record("r", data.draw(st.sampled_from(ALIGNMENTS)), "p", "r"), tokens))
    length = 12
    rows, row, used = [], [], 0
    for index, item in enumerate(encoded):  # one after the other; a record alone in its row may be longer than the row
        if row and used + len(item.tokens) > length:
            rows, row, used = [*rows, row], [], 0
        row, used = [*row, index], used + len(item.tokens)
    rows.append(row)
    records = Tokens.of(encoded, ALIGNMENTS)
    if dtype == np.uint16:
        small = (records.tokens & 0x7FFF | (records.tokens >> RESPONSE_BIT) << 15).astype(np.uint16)
        records = Tokens(small, records.starts, records.responses, records.labels, records.alignments)
    batch = collate(rows, records, length, pad_id=3, prompt_weight=prompt_weight)
    expected = slow(rows, encoded, length, 3, prompt_weight)
    columns = zip(*[tensor.flatten().tolist() for tensor in vars(batch).values()], strict=True)
    assert [list(column) for column in columns] == expected
    assert [tensor.dtype for tensor in vars(batch).values()] == [torch.int64] * 3 + [
        torch.float32,
        torch.int64,
        torch.int8,
        torch.int64,
    ]


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)
    ),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_records_logits_are_those_it_has_alone(family: str, attention: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    model.set_attn_implementation(attention)
    generator = np.random.default_rng(0)
    encoded = [single("helpful", generator.integers(1, 50, size).tolist(), 2) for size in (7, 12, 3, 20, 5)]
    batch = collate([[0, 1, 2], [3, 4]], Tokens.of(encoded, ALIGNMENTS), 32, pad_id=0)
    with torch.inference_mode():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for index, item in enumerate(encoded):
            alone = model(input_ids=torch.tensor([item.input_ids]), use_cache=False).logits[0]
            assert (packed[batch.record_ids == index] - alone).abs().max() < 1e-5
    # the test can fail: without positions that start again, records see each other
    with torch.inference_mode():
        mixed = model(input_ids=batch.input_ids, use_cache=False).logits
    assert (mixed[batch.record_ids == 1] - packed[batch.record_ids == 1]).abs().max() > 1e-3
