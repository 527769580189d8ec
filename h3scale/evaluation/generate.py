"""Greedy answers: compared with the expected ones, and shown with the experts that gave them.

Shape suffixes: B prompts, S tokens a row, T new tokens, L layers, E experts, A alignments, K choices a token.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from h3scale.data.encode import render_prompt
from h3scale.data.records import Record
from h3scale.errors import DataError
from h3scale.log import progress
from h3scale.model.experts import ExpertMap
from h3scale.model.router import alignment_log_probs, membership_AE
from h3scale.model.router_logits import with_router_logits

BATCH_PROMPTS = 32


@dataclass(frozen=True)
class ExpertShare:
    """What one expert had to do with an answer, as shares of 1 over its tokens and all layers.

    alignment: None for a general expert. weight: of the routing weights; first: how often it was the first choice.
    """

    expert: str
    alignment: str | None
    weight: float
    first: float


@dataclass(frozen=True)
class Answer:
    """`stopped`: it ended by itself. After `trace`, `pieces` are its tokens as text, each with the alignment seen in it."""

    text: str
    prompt_ids: list[int]
    new_ids: list[int]
    stopped: bool
    experts: list[ExpertShare] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One record's prompt, the expected answer and the model's."""

    record: Record
    answer: Answer
    exact: bool


def normalise(text: str) -> str:
    """All white space as single spaces, none at the ends: what exact match compares."""
    return " ".join(text.split())


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's and the model's own."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def greedy(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: set[int]) -> list[list[int]]:
    """The most probable next token again and again, (prompts) lists of new ids that end with a stop id or at the limit.

    Prompts are padded on the left and masked; an answer does not depend on its neighbours beyond fp rounding.
    """
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids_BS = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(stop_ids), device=device)
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new: list[Tensor] = []
    cache = None
    with torch.inference_mode():
        while len(new) < max_new_tokens and not done_B.all():
            output = model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            ids_BS = output.logits[:, -1].argmax(-1, keepdim=True)
            new.append(ids_BS[:, 0])
            done_B = done_B | torch.isin(ids_BS[:, 0], stops)
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(prompts), 1)], dim=1)
            position_BS = position_BS[:, -1:] + 1
    rows = torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]
    return [_until_stop(row, stop_ids) for row in rows]


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 256) -> Answer:
    """The greedy answer to one prompt, and for an MoE who gave it.

    Raises DataError (65) without a chat template, or when the prompt leaves no room for an answer.
    """
    answer = answers(model, tokenizer, [prompt], max_new_tokens)[0]
    limit = _max_tokens(model)
    if len(answer.prompt_ids) >= limit:
        size = len(answer.prompt_ids)
        raise DataError(f"prompt: {size} tokens, and the model holds {limit} with its answer (shorten the prompt)")
    return trace(model, tokenizer, answer)


def answers(model: Any, tokenizer: Any, prompts: Sequence[str | Sequence[dict[str, str]]], max_new_tokens: int) -> list[Answer]:
    """The greedy answers to some prompts (texts, or conversations up to the answer), generated as one batch.

    An answer is empty where the prompt leaves no room for one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    prompt_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rooms = [max(0, min(max_new_tokens, _max_tokens(model) - len(ids))) for ids in prompt_ids]
    stop_ids = end_ids(model, tokenizer)
    fits = [i for i, room in enumerate(rooms) if room]
    found = [Answer("", ids, [], False) for ids in prompt_ids]
    if not fits:
        return found
    given = greedy(model, [prompt_ids[i] for i in fits], max(rooms), stop_ids)
    for i, ids in zip(fits, given, strict=True):
        new_ids = ids[: rooms[i]]
        stopped = new_ids[-1] in stop_ids
        said = new_ids[:-1] if stopped else new_ids
        found[i] = Answer(tokenizer.decode(said, skip_special_tokens=True).strip(), prompt_ids[i], new_ids, stopped)
    return found


def _max_tokens(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 2**31)


def trace(model: Any, tokenizer: Any, answer: Answer) -> Answer:
    """The answer with its experts and pieces, from the positions that produced its tokens; as it was for a dense model."""
    expert_map = ExpertMap.from_config(model.config)
    if expert_map is None or not answer.new_ids:
        return answer
    device = next(model.parameters()).device
    ids_BS = torch.tensor([[*answer.prompt_ids, *answer.new_ids[:-1]]], device=device)
    with torch.inference_mode():
        router_logits = with_router_logits(model, model, input_ids=ids_BS, use_cache=False).router_logits
    first = len(answer.prompt_ids) - 1
    logits_LTE = torch.stack([logits_TE[first:].float().cpu() for logits_TE in router_logits])
    votes_TA = alignment_log_probs(logits_LTE, membership_AE(expert_map)).sum(0)
    seen = [expert_map.alignments[label] for label in votes_TA.argmax(-1).tolist()]
    said = answer.new_ids[:-1] if answer.stopped else answer.new_ids
    pieces = list(zip(_pieces(tokenizer, said), seen, strict=False))
    return replace(answer, experts=_shares(logits_LTE, expert_map, model.config.num_experts_per_tok), pieces=pieces)


def _shares(logits_LTE: Tensor, expert_map: ExpertMap, top_k: int) -> list[ExpertShare]:
    weights_LTK, ids_LTK = logits_LTE.softmax(-1).topk(top_k, dim=-1)
    weights_LTK = weights_LTK / weights_LTK.sum(-1, keepdim=True)
    weight_E = torch.zeros(expert_map.num_experts).index_add_(0, ids_LTK.flatten(), weights_LTK.flatten())
    first_E = torch.bincount(ids_LTK[..., 0].flatten(), minlength=expert_map.num_experts)
    weight_E, first_E = weight_E / weight_E.sum(), first_E / first_E.sum()
    rows = zip(expert_map.names(), expert_map.experts, weight_E.tolist(), first_E.tolist(), strict=True)
    return [ExpertShare(*row) for row in rows]


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text (a tokenizer's own pieces lose their spaces when decoded alone)."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def choose(records: Sequence[Record], per_alignment: int) -> list[Record]:
    """Up to so many records of each alignment, evenly spread over its records in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.alignment, []).append(record)
    chosen = []
    for group in groups.values():
        count = min(per_alignment, len(group))
        chosen += [group[i * len(group) // count] for i in range(count)]
    return chosen


def exact_match(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    max_new_tokens: int,
    *,
    route: Callable[[str], AbstractContextManager[None]] | None = None,
    num_samples: int = 4,
) -> tuple[dict[str, dict[str, float | int]], list[Sample]]:
    """For each alignment {exact: share of its answers that are the expected one, records}, and some samples of each.

    Compared after `normalise`. `route(alignment)` is entered around the generation for that alignment's prompts; samples
    then do not say which experts answered.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.alignment, []).append(record)
    table: dict[str, dict[str, float | int]] = {}
    samples = []
    with progress("generate", len(records), "answers") as bar:
        for alignment, group in groups.items():
            shown = {record.id for record in choose(group, num_samples)}
            hits = 0
            with route(alignment) if route else nullcontext():
                for part in _batches(group):
                    given = answers(model, tokenizer, [record.messages[:-1] for record in part], max_new_tokens)
                    bar.advance(len(part))
                    for record, answer in zip(part, given, strict=True):
                        exact = normalise(answer.text) == normalise(record.response)
                        hits += exact
                        if record.id in shown:
                            samples.append(Sample(record, answer if route else trace(model, tokenizer, answer), exact))
            table[alignment] = {"exact": hits / len(group), "records": len(group)}
    return table, samples


def _batches(records: Sequence[Record]) -> list[list[Record]]:
    """Of about equal lengths, so that little is padded."""
    ordered = sorted(records, key=lambda record: (len(record.prompt), record.id))
    return [ordered[first : first + BATCH_PROMPTS] for first in range(0, len(ordered), BATCH_PROMPTS)]
