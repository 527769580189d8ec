"""From records to token ids by the tokenizer's chat template, and from packed rows to tensors.

Shape suffixes: B rows, S tokens a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h3scale.data.records import Record
from h3scale.errors import DataError

IGNORE = -100  # a target that costs nothing, torch's default ignore_index
PADDING, PROMPT, RESPONSE = 0, 1, 2  # roles of a token


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record: `num_prompt_tokens` of the rendered prompt, then the response and its end token."""

    record: Record
    input_ids: list[int]
    num_prompt_tokens: int

    @property
    def num_response_tokens(self) -> int:
        return len(self.input_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class Batch:
    """Rows of packed records, all (B, S) int64. A row's records cannot see each other: positions start at 0 again.

    targets: the token that each position has to predict, IGNORE where none is asked for; no shift is needed.
    target_weights: how much each target counts, float32: 1 in responses, `prompt_weight` in prompts.
    alignment_ids: the record's alignment for every token, -1 on padding. roles: PADDING, PROMPT or RESPONSE.
    record_ids: which of the encoded records a token is of, -1 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    target_weights: Tensor
    alignment_ids: Tensor
    roles: Tensor
    record_ids: Tensor


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """The text a model gets before it answers, by the tokenizer's chat template."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_records(tokenizer: Any, records: Sequence[Record]) -> list[Encoded]:
    """Token ids of all records, in order. The template renders prompt and response, tokens are told apart by position.

    Raises DataError (65) when the tokenizer has no chat template, or one whose conversation does not begin with its prompt,
    and for records whose text holds the tokenizer's special tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    forged = [
        f"record {record.id}: its text has the special token '{token}', which would end or begin a turn"
        for record in records
        for token in tokenizer.all_special_tokens
        if token in record.prompt or token in record.response
    ]
    if forged:
        raise DataError(forged[:20])
    prompts = [render_prompt(tokenizer, record.prompt) for record in records]
    texts = []
    for record, prompt in zip(records, prompts, strict=True):
        messages = [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.response}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        if not texts[-1].startswith(prompt):
            raise DataError(f"record {record.id}: the chat template's conversation does not begin with its prompt")
    if not texts:
        return []
    tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded = []
    for record, prompt, ids, offsets in zip(records, prompts, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        num_prompt_tokens = sum(end <= len(prompt) for _, end in offsets)
        encoded.append(Encoded(record, ids, num_prompt_tokens))
    return encoded


def collate(
    rows: Sequence[Sequence[int]],
    encoded: Sequence[Encoded],
    alignments: Sequence[str],
    length: int,
    pad_id: int,
    prompt_weight: float = 0.0,
) -> Batch:
    """Tensors of some rows, each a list of indices into `encoded`, padded to `length` tokens.

    `prompt_weight` above 0 asks for the prompts' tokens as well (a base learns to read). Records longer than `length`
    are cut at the end. An alignment that is not in `alignments` gets id -1.
    """
    shape = (len(rows), length)
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "position_ids": np.zeros(shape, np.int64),
        "targets": np.full(shape, IGNORE, np.int64),
        "target_weights": np.zeros(shape, np.float32),
        "alignment_ids": np.full(shape, -1, np.int64),
        "roles": np.full(shape, PADDING, np.int64),
        "record_ids": np.full(shape, -1, np.int64),
    }
    label_of = {alignment: i for i, alignment in enumerate(alignments)}
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            item = encoded[index]
            ids = np.asarray(item.input_ids[: length - start], np.int64)
            end = start + len(ids)
            arrays["input_ids"][b, start:end] = ids
            arrays["position_ids"][b, start:end] = np.arange(len(ids))
            arrays["alignment_ids"][b, start:end] = label_of.get(item.record.alignment, -1)
            arrays["record_ids"][b, start:end] = index
            arrays["roles"][b, start:end] = np.where(np.arange(len(ids)) < item.num_prompt_tokens, PROMPT, RESPONSE)
            first = 1 if prompt_weight > 0 else item.num_prompt_tokens
            arrays["targets"][b, start + first - 1 : end - 1] = ids[first:]
            in_response = np.arange(first, len(ids)) >= item.num_prompt_tokens
            arrays["target_weights"][b, start + first - 1 : end - 1] = np.where(in_response, 1.0, prompt_weight)
            start = end
        arrays["position_ids"][b, start:] = np.arange(length - start)
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def target_weight(item: Encoded, length: int, prompt_weight: float) -> float:
    """The sum of a record's target weights when it starts a row of `length`; the loader adds these up."""
    kept = min(len(item.input_ids), length)
    in_prompt = min(kept, item.num_prompt_tokens) - 1
    return max(0, kept - item.num_prompt_tokens) + prompt_weight * max(0, in_prompt)
