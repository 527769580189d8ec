"""The router's first weights, fitted on the fused model's own hidden states while every record goes to its own experts.

Closed-form ridge after DUME (arXiv 2603.29765, its code). Where we differ: no bias (no router here has one), targets one-hot
minus 1/A instead; alignments weigh equally, whatever their number of tokens; one scale for all rows and layers, chosen
on records that the fit has not seen, instead of normalised columns and a temperature; hidden states of the fused model,
not of a dense one.

Shape suffixes: B rows, S tokens a row, T tokens, L layers, H hidden_size, E experts, C copies, A alignments, R records.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.config.fuse import RouterStart
from h3scale.data.collate import PADDING, PROMPT, RESPONSE, Batch, collate
from h3scale.data.encode import Encoded
from h3scale.data.packing import pack
from h3scale.data.store import Tokens
from h3scale.fusion.solve import Logistic, PromptMean, Ridge, Solver, best_scale
from h3scale.log import progress
from h3scale.model.accuracy import record_log_probs, share_correct
from h3scale.model.experts import ExpertMap
from h3scale.model.router import expert_weights, forced_routing, membership_AE, router_modules

ROW_TOKENS = 512  # rows of several short records waste little room on padding
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class RouterFit:
    """`weights_LEH`: one fp64 (E, H) a layer. `scale` and `token_nll` (ln A is guessing) are None for random."""

    weights_LEH: tuple[Tensor, ...]
    scale: float | None = None
    token_nll: float | None = None


def fit_router(
    model: nn.Module, expert_map: ExpertMap, fit: Sequence[Encoded], held: Sequence[Encoded], start: RouterStart
) -> RouterFit:
    """Fits every layer's router as `start.init` says on the records of `fit`; the one scale is chosen on `held`.

    `model` is the fused transformers model in evaluation mode; what its routers hold plays no part. Prompt and response
    tokens count, padding does not. Every alignment must have a record in both sets.
    """
    if start.init == "random":
        return RouterFit(random_rows(model, expert_map, start.seed))
    solver = _solver(model, expert_map, fit, start)
    oracle_pass(model, expert_map, fit, solver.add)
    generator = torch.Generator().manual_seed(start.seed)
    rows_LEH = [part_copies(expert_rows(rows_AH, expert_map), expert_map, start.copy_noise, generator) for rows_AH in solver.rows()]
    logits: list[list[list[Tensor]]] = [[[] for _ in expert_map.alignments] for _ in rows_LEH]

    def keep_logits(layer: int, alignment_id: int, hidden_TH: Tensor, is_prompt_T: Tensor) -> None:
        logits[layer][alignment_id].append(hidden_TH @ rows_LEH[layer].T)

    oracle_pass(model, expert_map, held, keep_logits)
    joined = [[torch.cat(pieces) for pieces in by_alignment] for by_alignment in logits]
    scale, token_nll = best_scale(joined, membership_AE(expert_map, joined[0][0].device))
    return RouterFit(tuple(scale * rows_EH for rows_EH in rows_LEH), scale, token_nll)


def _solver(model: nn.Module, expert_map: ExpertMap, fit: Sequence[Encoded], start: RouterStart) -> Solver:
    num_layers, alignments = len(router_modules(model)), expert_map.alignments
    if start.init == "logistic":
        return Logistic(num_layers, len(alignments), start.ridge)
    if start.init == "prompt_mean":
        return PromptMean(num_layers, len(alignments))
    tokens = [sum(len(e.tokens) for e in fit if e.record.alignment == alignment) for alignment in alignments]
    return Ridge(num_layers, tokens, start.ridge)


def random_rows(model: nn.Module, expert_map: ExpertMap, seed: int) -> tuple[Tensor, ...]:
    """N(0, initializer_range) for every expert, general ones included: what an untrained mixture has."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    shape = (expert_map.num_experts, config.hidden_size)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * config.initializer_range for _ in router_modules(model)
    )


def set_routers(model: nn.Module, weights_LEH: Sequence[Tensor]) -> None:
    """Puts (E, H) weights into the routers, in layer order."""
    with torch.no_grad():
        for router, weights_EH in zip(router_modules(model), weights_LEH, strict=True):
            weight: Any = router.weight
            weight.copy_(weights_EH)


def expert_rows(rows_AH: Tensor, expert_map: ExpertMap) -> Tensor:
    """From a row an alignment to a row an expert: experts of one alignment share it, general ones get zeros."""
    rows_EH = rows_AH.new_zeros(expert_map.num_experts, rows_AH.shape[1])
    for row_H, alignment in zip(rows_AH, expert_map.alignments, strict=True):
        rows_EH[expert_map.experts_of(alignment)] = row_H
    return rows_EH


def part_copies(rows_EH: Tensor, expert_map: ExpertMap, noise: float, generator: torch.Generator) -> Tensor:
    """The rows with those of equal experts (one alignment's, or the general ones) moved apart, their mean unchanged.

    How far, as root mean square over the copies: `noise` times that of the labelled rows' lengths (a general expert's own
    row is zero). An expert without a copy keeps its row bit for bit.
    """
    length = rows_EH[expert_map.labelled].square().sum(1).mean().sqrt()
    parted_EH = rows_EH.clone()
    for alignment in (*expert_map.alignments, None):
        copies = [expert for expert, own in enumerate(expert_map.experts) if own == alignment]
        if len(copies) > 1:
            draws_CH = torch.randn(len(copies), rows_EH.shape[1], generator=generator, dtype=torch.float64).to(rows_EH)
            draws_CH -= draws_CH.mean(0)
            parted_EH[copies] += noise * length * draws_CH / draws_CH.square().sum(1).mean().sqrt()
    return parted_EH


def oracle_pass(
    model: nn.Module, expert_map: ExpertMap, encoded: Sequence[Encoded], use: Callable[[int, int, Tensor, Tensor], None]
) -> None:
    """Runs all records, those of one alignment after those of the other, each through its own alignment's experts only.

    `use(layer, alignment_id, hidden_TH, is_prompt_T)` gets the fp64 input of each layer's router, without padding.
    """
    with progress("router start", sum(len(item.tokens) for item in encoded), "tokens") as bar:
        for alignment_id, alignment in enumerate(expert_map.alignments):
            own = [item for item in encoded if item.record.alignment == alignment]
            with forced_routing(model, expert_weights(expert_map, alignment)):
                for batch in _batches(own):
                    roles_T = batch.roles.flatten().to(_device(model))
                    valid_T = roles_T != PADDING
                    is_prompt_T = roles_T[valid_T] == PROMPT

                    def take(
                        layer: int,
                        hidden_TH: Tensor,
                        alignment_id: int = alignment_id,
                        valid_T: Tensor = valid_T,
                        is_prompt_T: Tensor = is_prompt_T,
                    ) -> None:
                        use(layer, alignment_id, hidden_TH[valid_T].double(), is_prompt_T)

                    with _router_inputs(model, take):
                        _run(model, batch)
                    bar.advance(int(valid_T.sum()))


def router_accuracy(model: nn.Module, encoded: Sequence[Encoded], expert_map: ExpertMap) -> dict[str, float | None]:
    """Of each alignment the share of records that the routers, deciding themselves, see as that alignment.

    A record's alignment is the argmax of the log-probabilities summed over layers and response tokens; a record without
    response tokens is not counted. None for an alignment without records.
    """
    device = _device(model)
    label_of = {alignment: i for i, alignment in enumerate(expert_map.alignments)}
    labels_R = torch.tensor([label_of.get(e.record.alignment, -1) if e.num_response_tokens > 0 else -1 for e in encoded])
    member_AE = membership_AE(expert_map, device)
    sums_RA = torch.zeros(len(encoded), len(label_of), device=device)
    for batch in _batches(encoded):
        with _router_logits(model) as logits:
            _run(model, batch)
        record_ids_T, is_response_T = batch.record_ids.flatten().to(device), (batch.roles.flatten() == RESPONSE).to(device)
        sums_RA += record_log_probs(logits, record_ids_T, is_response_T, member_AE, len(encoded))
    return dict(zip(expert_map.alignments, share_correct(sums_RA.cpu(), labels_R, len(label_of)), strict=True))


def cut(encoded: Sequence[Encoded], max_tokens: int) -> list[Encoded]:
    """Records no longer than `max_tokens`."""
    return [item.cut(max_tokens) for item in encoded]


def _batches(encoded: Sequence[Encoded]) -> Iterator[Batch]:
    """All records whole, packed into rows that are no longer than they need be. Alignment ids are left at -1."""
    lengths = [len(item.tokens) for item in encoded]
    if not lengths:
        return
    capacity = max(max(lengths), min(ROW_TOKENS, sum(lengths)))
    rows = pack(lengths, capacity)
    tokens = Tokens.of(encoded, ())
    rows_per_batch = max(1, BATCH_TOKENS // capacity)
    for first in range(0, len(rows), rows_per_batch):
        yield collate(rows[first : first + rows_per_batch], tokens, capacity, pad_id=0)


@torch.no_grad()
def _run(model: Any, batch: Batch) -> None:
    """The decoder alone: no logits over the vocabulary. Positions that start again keep packed records apart."""
    device = _device(model)
    model.model(input_ids=batch.input_ids.to(device), position_ids=batch.position_ids.to(device), use_cache=False)


@contextmanager
def _router_inputs(model: nn.Module, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `take(layer, hidden_TH)` with each router's input."""
    handles = []
    for layer, router in enumerate(router_modules(model)):

        def hook(_module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            take(layer, args[0].flatten(0, -2))

        handles.append(router.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills with each router's (T, E) logits, in layer order, during the next forward."""
    logits: list[Tensor] = []
    handles = [r.register_forward_hook(lambda _m, _a, output: logits.append(output[0])) for r in router_modules(model)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
