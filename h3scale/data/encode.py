"""From records to token ids by the tokenizer's chat template. numpy only: preparing workers need no torch."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from h3scale.data.records import Record
from h3scale.errors import ConfigError, DataError

LONGEST_TAIL = 40  # characters of a template between its last added token and an answer, such as "assistant\n"
PLACEHOLDER = "a prompt in whose place others will stand"
ANSWER_PLACEHOLDER = "an answer in whose place others will stand"
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


def answer_lead(tokenizer: Any) -> str:
    """What the chat template writes between a prompt, as `render_prompt` gives it, and the text of the answer.

    Raises ConfigError (78) for a tokenizer without a chat template.
    """
    _check_template(tokenizer)
    said = [{"role": "user", "content": PLACEHOLDER}, {"role": "assistant", "content": ANSWER_PLACEHOLDER}]
    text, before = tokenizer.apply_chat_template(said, tokenize=False), render_prompt(tokenizer, PLACEHOLDER)
    lead, found, _ = text.removeprefix(before).partition(ANSWER_PLACEHOLDER)
    return lead if found and text.startswith(before) else ""


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
    _check_template(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{tokenizer.name_or_path}: not a fast tokenizer (works: a folder with tokenizer.json)")
    special = special_tokens(tokenizer)
    conversations = [record.messages for record in records]
    forged = [next((m for turn in said if (m := special.search(turn["content"]))), None) for said in conversations]
    rendered = iter(_render_all(tokenizer, [said for said, found in zip(conversations, forged, strict=True) if not found]))
    items: list[np.ndarray | str] = []
    texts: list[str] = []
    spans: list[list[Span]] = []
    for found in forged:
        text, places = ("", []) if found else next(rendered)
        if found:
            items.append(f"its text has the special token '{found.group()}', which would end or begin a turn")
        elif places is None:
            items.append(text)
        else:
            items.append("")
            texts.append(text)
            spans.append(places)
    with _whole(tokenizer.backend_tokenizer):
        flagged = iter(_Flagger(tokenizer).flagged(texts, spans))
    return [item or next(flagged) for item in items]


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")


Span = tuple[int, int]


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Whatever the tokenizer takes for a mark and not for text: its named special tokens, and all added ones of that kind."""
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(token) for token in sorted(marks, key=len, reverse=True)) or r"(?!)")


@contextmanager
def _whole(backend: Any) -> Iterator[None]:
    """Without the truncation and padding that a tokenizer.json, or an earlier call, may have left in the tokenizer."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def _render_all(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[tuple[str, list[Span] | None]]:
    """As _render, but what is wrong with a conversation instead of its text where there are no places."""
    try:
        rendered = _render(tokenizer, conversations)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{tokenizer.name_or_path}: the chat template is not valid ({error})") from None
    except TemplateError as error:  # the template itself refuses: a system turn, or turns that do not alternate
        if len(conversations) == 1:
            return [(f"the chat template refuses it ({error})", None)]
        return [one for said in conversations for one in _render_all(tokenizer, [said])]
    wrong = "the chat template's conversation does not begin with its prompt"
    return [(wrong if places is None else text, places) for text, places in rendered]


def _render(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[tuple[str, list[Span] | None]]:
    """Each conversation as text, and from where to where the assistant speaks; None where the template is not a prefix."""
    if not conversations:
        return []
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    around = _around_prompt(tokenizer)
    places = [_single_answer(said, text, *around) for said, text in zip(conversations, texts, strict=True)]
    others = [c for c, spans in enumerate(places) if spans is None]
    found = _answers(tokenizer, [conversations[c] for c in others], [texts[c] for c in others])
    for c, spans in zip(others, found, strict=True):
        places[c] = spans
    return list(zip(texts, places, strict=True))


def _around_prompt(tokenizer: Any) -> tuple[str, str]:
    """What the template writes before a first prompt, and between it and the answer."""
    before, _, after = render_prompt(tokenizer, PLACEHOLDER).partition(PLACEHOLDER)
    return before, after


def _single_answer(said: list[dict[str, str]], text: str, before: str, after: str) -> list[Span] | None:
    """The answer's place in one exchange whose text reads as expected (half the rendering of any other way); else None."""
    if len(said) == 2:
        begin = f"{before}{said[0]['content']}{after}"
        if text.startswith(begin) and text.startswith(said[1]["content"], len(begin)):
            return [(len(begin), len(text))]
    return None


def _answers(tokenizer: Any, conversations: list[list[dict[str, str]]], texts: list[str]) -> list[list[Span] | None]:
    """The answers' places in any conversation: by rendering it up to each of the assistant's turns, and with it."""
    turns = [(c, i) for c, said in enumerate(conversations) for i, turn in enumerate(said) if turn["role"] == "assistant"]
    if not turns:
        return [[] for _ in conversations]
    befores = tokenizer.apply_chat_template([conversations[c][:i] for c, i in turns], tokenize=False, add_generation_prompt=True)
    inner = [(c, i) for c, i in turns if i < len(conversations[c]) - 1]
    afters = tokenizer.apply_chat_template([conversations[c][: i + 1] for c, i in inner], tokenize=False) if inner else []
    after_of = dict(zip(inner, afters, strict=True))
    places: list[list[Span] | None] = [[] for _ in conversations]
    for (c, i), before in zip(turns, befores, strict=True):
        after = after_of.get((c, i), texts[c])
        spans = places[c]
        if not texts[c].startswith(before) or not texts[c].startswith(after) or len(after) <= len(before):
            places[c] = None
        elif spans is not None:
            spans.append((len(before), len(after)))
    return places


class _Flagger:
    """Token ids of texts, with the answer's bit on some spans of characters.

    Tokens with their places in the text cost a third more than tokens alone, so places are asked for only where they are needed:
    a span that begins or ends a few characters after an added token (as in `<|im_start|>assistant\\n`) is found by
    counting added tokens, and by comparing what follows with these few characters tokenized by themselves.
    """

    def __init__(self, tokenizer: Any):
        self.backend = tokenizer.backend_tokenizer
        # not the one for unknown words, which stands for other text than its own
        added = {token: i for token, i in tokenizer.get_added_vocab().items() if i != tokenizer.unk_token_id}
        longest_first = sorted(added, key=len, reverse=True)
        self.pattern = re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")
        self.is_added = np.zeros(max([len(tokenizer), *(i + 1 for i in added.values())]), bool)
        self.is_added[list(added.values())] = True
        self.tails: dict[str, list[int]] = {"": []}

    def flagged(self, texts: list[str], spans: list[list[Span]]) -> list[np.ndarray]:
        """(S,) uint32 for each text. A token that reaches over the beginning of an answer belongs to the answer."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        found: list[np.ndarray] = []
        for text, places, encoding in zip(texts, spans, encodings, strict=True):
            ids = encoding.ids  # a new list each time it is asked for
            tokens = np.array(ids, np.uint32)
            bounds = self._by_counting(text, places, ids, tokens)
            if bounds is None:
                bounds = self._by_offsets(text, places)
            for first, last in bounds:
                tokens[first:last] |= np.uint32(1 << RESPONSE_BIT)
            found.append(tokens)
        return found

    def _by_counting(self, text: str, places: list[Span], ids: list[int], tokens: np.ndarray) -> list[Span] | None:
        """First and last token of each span; None where that cannot be told for certain."""
        ends = [match.end() for match in self.pattern.finditer(text)]
        marks = np.flatnonzero(self.is_added[tokens]).tolist()
        if len(ends) != len(marks):
            return None
        bounds = []
        for begin, end in places:
            first = self._after(text, begin, ends, marks, ids)
            last = len(ids) if end == len(text) else self._after(text, end, ends, marks, ids)
            if first is None or last is None:
                return None
            bounds.append((first, last))
        return bounds

    def _after(self, text: str, char: int, ends: list[int], marks: list[int], ids: list[int]) -> int | None:
        """The first token from a character on, if it lies shortly after an added token and begins there."""
        number = bisect_right(ends, char)
        if not number or char - ends[number - 1] > LONGEST_TAIL:
            return None
        tail = text[ends[number - 1] : char]
        if tail not in self.tails:
            self.tails[tail] = self.backend.encode(f"{text[: ends[number - 1]]}{tail}", add_special_tokens=False).ids[
                marks[number - 1] + 1 :
            ]
        expected = self.tails[tail]
        first = marks[number - 1] + 1
        return first + len(expected) if ids[first : first + len(expected)] == expected else None

    def _by_offsets(self, text: str, places: list[Span]) -> list[Span]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        size = len(encoding.ids)
        return [
            (_token_at(encoding, begin, size), size if end == len(text) else _token_at(encoding, end, size))
            for begin, end in places
        ]


def _token_at(encoding: Any, char: int, size: int) -> int:
    """The first token that ends after this character's beginning; `size` past the end."""
    token = encoding.char_to_token(char)
    if token is not None:
        return token
    return next((i for i, (_, end) in enumerate(encoding.offsets) if end > char), size)
