"""How likely a model finds each of several answers to a prompt: sums of log-probabilities over the answers' tokens.

The prompt goes through the model once for all its answers: a row holds prompts with their answers as branches, and a
mask lets a token see its own branch and its prompt only.

Shape suffixes: B rows, S tokens a row, T tokens that are asked for, V vocabulary, A answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from h3scale.config.suite import PLACE
from h3scale.data.encode import answer_lead, render_prompt, special_tokens
from h3scale.data.items import Item
from h3scale.data.packing import pack
from h3scale.errors import DataError
from h3scale.evaluation.score import BATCH_LOGITS, BATCH_TOKENS, ROW_TOKENS, Route

MAX_SHOWN = 20
PADDING = -1  # as a piece


@dataclass(frozen=True)
class Asked:
    """A prompt and its answers as token ids, in the item's order. `cut`: prompt tokens left out at its beginning."""

    item: Item
    prompt: list[int]
    answers: list[list[int]]
    cut: int = 0


@dataclass(frozen=True)
class _Piece:
    """A prompt with some of its answers, in one row. `first_answer`: the number of the first of them among all answers."""

    prompt: list[int]
    answers: list[list[int]]
    first_answer: int
    label: int

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)  # an answer's last token predicts nothing


def encode_items(tokenizer: Any, items: Sequence[Item], template: str | None, limit: int) -> tuple[list[Asked], int]:
    """The items as token ids, and how many are left out because an answer alone is longer than the model's `limit`.

    Prompt and answer are tokenized together; what the prompt alone gives is the prompt (as lm-evaluation-harness does, and as it
    does, blanks at the prompt's end go to the answer). No end-of-turn token is scored. Where an item is longer than `limit`,
    the prompt loses its beginning, as much for each answer of the item. Raises DataError (65) for items with special tokens in
    their texts, conversations that the chat template refuses and answers without a token, ConfigError (78) without a chat template.
    """
    special = special_tokens(tokenizer)
    lead, opening = (" ", _opening(tokenizer)) if template else (answer_lead(tokenizer), [])
    found: list[Asked] = []
    findings: list[str] = []
    for item in items:
        said = [turn["content"] for turn in item.messages]
        forged = next((m for text in (*said, *item.answers) if (m := special.search(text))), None)
        if forged:
            findings.append(f"item {item.id}: its text has the special token '{forged.group()}', which would end or begin a turn")
            continue
        try:
            before = template.replace(PLACE, item.prompt) if template else render_prompt(tokenizer, item.messages)
        except TemplateError as error:  # it has no place for a system turn, say
            findings.append(f"item {item.id}: the chat template refuses it ({error})")
            continue
        prompt, answers = _tokens(tokenizer, before + lead, item.answers)
        findings += [f"item {item.id}: an answer has no token of its own" for answer in answers if not answer][:1]
        prompt = opening + prompt
        cut = max(0, len(prompt) + max(map(len, answers)) - 1 - limit)
        if cut < len(prompt):
            found.append(Asked(item, prompt[cut:], answers, cut))
    if findings:
        raise DataError(findings[:MAX_SHOWN] + ([f"and {len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []))
    return found, len(items) - len(found)


def log_probs(
    model: Any, asked: Sequence[Asked], labels: Sequence[int] | None = None, route: Route | None = None
) -> list[list[float]]:
    """For each item the log-probability of each of its answers, summed over the answer's tokens.

    The forward is in the model's dtype, the log-softmax in fp32, sums in fp64. The same call on the same machine gives the
    same bits. `labels`: the alignment of each item, for a `route` that goes by it.
    """
    pieces = list(_pieces(asked, labels or [-1] * len(asked)))
    length = max([ROW_TOKENS, *(piece.size for piece in pieces)])
    rows = pack([piece.size for piece in pieces], length)
    rows_per_batch = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // length)
    sums_A = torch.zeros(sum(len(each.answers) for each in asked), dtype=torch.float64)
    with torch.inference_mode():
        for first in range(0, len(rows), rows_per_batch):
            batch = _Batch([[pieces[i] for i in row] for row in rows[first : first + rows_per_batch]], length)
            _add_batch(model, batch, route, sums_A)
    values = iter(sums_A.tolist())
    return [[next(values) for _ in each.answers] for each in asked]


def _opening(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokens(tokenizer: Any, before: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    stripped = before.rstrip()
    blank = before[len(stripped) :]
    texts = [stripped, *(f"{stripped}{blank}{answer}" for answer in answers)]
    prompt, *whole = tokenizer(texts, add_special_tokens=False).input_ids
    return prompt, [ids[len(prompt) :] for ids in whole]


def _pieces(asked: Sequence[Asked], labels: Sequence[int]) -> Iterator[_Piece]:
    """Items, those in several pieces whose answers together would be more than a batch."""
    number = 0
    for each, label in zip(asked, labels, strict=True):
        held: list[list[int]] = []
        for answer in each.answers:
            if held and _Piece(each.prompt, [*held, answer], 0, 0).size > BATCH_TOKENS:
                yield _Piece(each.prompt, held, number, label)
                number, held = number + len(held), []
            held.append(answer)
        yield _Piece(each.prompt, held, number, label)
        number += len(held)


class _Batch:
    """Rows of pieces, (B, S) each, and of the T tokens asked for: row, the place that predicts it, token, answer."""

    def __init__(self, rows: Sequence[Sequence[_Piece]], length: int):
        shape = (len(rows), length)
        self.input_ids, self.position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.pieces, self.branches = np.full(shape, PADDING), np.zeros(shape, np.int64)  # branch 0 is the prompt's
        self.alignment_ids = np.full(shape, -1)
        self.asked: list[tuple[int, int, int, int]] = []
        for b, row in enumerate(rows):
            place = 0
            for number, piece in enumerate(row):
                self.alignment_ids[b, place : place + piece.size] = piece.label
                self.pieces[b, place : place + piece.size] = number
                place = self._put(b, place, piece)

    def _put(self, b: int, start: int, piece: _Piece) -> int:
        last = start + len(piece.prompt) - 1
        self._write(b, start, piece.prompt, 0, 0)
        place = last + 1
        for branch, answer in enumerate(piece.answers):
            places = [last, *range(place, place + len(answer) - 1)]
            number = piece.first_answer + branch
            self.asked += [(b, at, token, number) for at, token in zip(places, answer, strict=True)]
            self._write(b, place, answer[:-1], branch + 1, len(piece.prompt))
            place += len(answer) - 1
        return place

    def _write(self, b: int, place: int, tokens: list[int], branch: int, position: int) -> None:
        span = slice(place, place + len(tokens))
        self.input_ids[b, span] = tokens
        self.position_ids[b, span] = np.arange(position, position + len(tokens))
        self.branches[b, span] = branch

    def masks(self, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """(B, 1, S, S) to be added to the attention's scores: 0 where a token sees another, else the least number there is.

        A dict by kind of layer where a model has layers with a window and others without.
        """
        pieces, branches, positions = (torch.from_numpy(a) for a in (self.pieces, self.branches, self.position_ids))
        sees = pieces[:, :, None] == pieces[:, None, :]
        sees &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
        sees &= torch.ones(sees.shape[1:], dtype=torch.bool).tril()
        window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
        if not window or kinds == {"full_attention"}:
            return _added(sees, dtype)
        near = _added(sees & (positions[:, :, None] - positions[:, None, :] < window), dtype)
        return {"full_attention": _added(sees, dtype), "sliding_attention": near} if "full_attention" in kinds else near


def _added(sees_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(sees_BSS, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _add_batch(model: Any, batch: _Batch, route: Route | None, sums_A: Tensor) -> None:
    weight = next(model.parameters())
    alignment_ids = torch.from_numpy(batch.alignment_ids)
    masks = batch.masks(model.config, weight.dtype)
    # transformers' balance loss, which a config can ask for, takes no mask of four dimensions
    routed = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    with route(alignment_ids) if route else nullcontext():
        output = model(
            input_ids=torch.from_numpy(batch.input_ids).to(weight.device),
            position_ids=torch.from_numpy(batch.position_ids).to(weight.device),
            attention_mask=_moved(masks, weight.device),
            use_cache=False,
            **routed,
        )
    row_T, place_T, token_T, answer_T = torch.tensor(batch.asked).unbind(1)
    logits_TV = output.logits[row_T.to(weight.device), place_T.to(weight.device)].float()
    nll_T = F.cross_entropy(logits_TV, token_T.to(weight.device), reduction="none")
    sums_A.index_add_(0, answer_T, -nll_T.double().cpu())


def _moved(masks: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    return masks.to(device) if isinstance(masks, Tensor) else {kind: mask.to(device) for kind, mask in masks.items()}
