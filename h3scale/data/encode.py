"""From records to token ids by the tokenizer's chat template. numpy only: preparing workers need no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h3scale.data.records import Record
from h3scale.errors import ConfigError, DataError

RESPONSE_BIT = 31  # set in a stored token that belongs to an answer; token ids stay below 2**31


@dataclass(frozen=True, eq=False)
class Encoded:
    """One record and its `tokens`, (S,) uint32: the token id, and bit 31 set for the tokens of the assistant's turns."""

    record: Record
    tokens: np.ndarray

    @classmethod
    def of(cls, record: Record, input_ids: Sequence[int], num_prompt_tokens: int) -> "Encoded":
        """A prompt of that many tokens, then its answer."""
        tokens = np.asarray(input_ids, np.uint32)
        tokens[num_prompt_tokens:] |= np.uint32(1 << RESPONSE_BIT)
        return cls(record, tokens)

    @property
    def input_ids(self) -> list[int]:
        return (self.tokens & np.uint32((1 << RESPONSE_BIT) - 1)).tolist()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first answer."""
        answers = np.flatnonzero(self.tokens >> RESPONSE_BIT)
        return int(answers[0]) if len(answers) else len(self.tokens)

    @property
    def num_response_tokens(self) -> int:
        return self.num_response_tokens_within(len(self.tokens))

    def num_response_tokens_within(self, length: int) -> int:
        """Tokens of answers among the first `length` tokens."""
        return int((self.tokens[:length] >> RESPONSE_BIT).sum())

    def cut(self, length: int) -> "Encoded":
        """The record without what comes after its first `length` tokens."""
        return Encoded(self.record, self.tokens[:length])


def render_prompt(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> str:
    """The text a model gets before it answers a user's turn, or a conversation up to it, by the tokenizer's chat template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_records(tokenizer: Any, records: Sequence[Record]) -> list[Encoded]:
    """Token ids of all records, in order.

    Raises DataError (65) with every record that `encode_block` has a finding for.
    """
    encoded = encode_block(tokenizer, records)
    findings = [f"record {r.id}: {item}" for r, item in zip(records, encoded, strict=True) if isinstance(item, str)]
    if findings:
        raise DataError(findings[:20] + ([f"and {len(findings) - 20} more"] if len(findings) > 20 else []))
    return [Encoded(r, item) for r, item in zip(records, encoded, strict=True) if isinstance(item, np.ndarray)]


def encode_block(tokenizer: Any, records: Sequence[Record]) -> list[np.ndarray | str]:
    """For each record its `tokens` (see Encoded), or what is wrong with it.

    The chat template renders the whole conversation, and its beginning up to each of the assistant's turns: what lies
    between is an answer, with the end-of-turn token that the template writes after it. Wrong are texts that hold the
    tokenizer's special tokens, and templates whose conversation does not begin with its own beginning.
    Raises ConfigError (78) when the tokenizer has no chat template or is not a fast one (its tokens have no places).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{tokenizer.name_or_path}: not a fast tokenizer (works: a folder with tokenizer.json)")
    special = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens) or r"(?!)")
    items: list[np.ndarray | str] = []
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for record in records:
        forged = next((m for turn in record.messages if (m := special.search(turn["content"]))), None)
        rendered = None if forged else _render(tokenizer, record.messages)
        if forged:
            items.append(f"its text has the special token '{forged.group()}', which would end or begin a turn")
        elif rendered is None:
            items.append("the chat template's conversation does not begin with its prompt")
        else:
            items.append("")
            texts.append(rendered[0])
            spans.append(rendered[1])
    encodings = iter(zip(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False), spans, strict=True))
    return [item or _flagged(*next(encodings)) for item in items]


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation as text, and from where to where the assistant speaks; None where the template is not a prefix."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = text if i == len(messages) - 1 else tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not text.startswith(before) or not text.startswith(after) or len(after) <= len(before):
            return None
        spans.append((len(before), len(after)))
    return text, spans


def _flagged(encoding: Any, spans: list[tuple[int, int]]) -> np.ndarray:
    """Ids with the answer's bit. A token that reaches over the beginning of an answer belongs to the answer."""
    tokens = np.array(encoding.ids, np.uint32)
    size = len(tokens)
    for begin, end in spans:
        first = _token_at(encoding, begin, size)
        last = _token_at(encoding, end, size)
        tokens[first:last] |= np.uint32(1 << RESPONSE_BIT)
    return tokens


def _token_at(encoding: Any, char: int, size: int) -> int:
    """The first token that ends after this character's beginning; `size` past the end."""
    token = encoding.char_to_token(char)
    if token is not None:
        return token
    return next((i for i, (_, end) in enumerate(encoding.offsets) if end > char), size)
