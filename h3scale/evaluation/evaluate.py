"""Everything that is measured of one model, as one JSON value without times, dates or paths."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.shards import ModelFolder
from h3scale.data.encode import Encoded
from h3scale.data.records import of_source
from h3scale.errors import UsageError
from h3scale.evaluation.generate import Sample, choose, exact_match
from h3scale.evaluation.routing import ROUTER_MODES, RoutingTally, route_for, route_for_alignment
from h3scale.evaluation.score import RecordScore, Scores, score_encoded, summarise
from h3scale.model.expert_compute import NAMES
from h3scale.model.experts import ExpertMap
from h3scale.model.start import check_tokenizer, load_model, load_tokenizer, placed

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """router: trained, uniform or oracle. generate: answers an alignment. exclude_sources: scored again without these.

    experts: what computes a fused model's.
    """

    router: str = "trained"
    generate: int = 0
    exclude_sources: tuple[str, ...] = ()
    experts: str = "auto"

    def __post_init__(self) -> None:
        if self.router not in ROUTER_MODES:
            raise UsageError(f"--router: '{self.router}' is none of {', '.join(ROUTER_MODES)}")


def open_model(folder: str | Path, experts: str = "auto") -> tuple[Any, Any]:
    """As `read_model`, the model on the GPU if there is one with room for four bytes a parameter and a fifth more."""
    model, tokenizer = read_model(folder, experts)
    return placed(model), tokenizer


def read_model(folder: str | Path, experts: str = "auto") -> tuple[Any, Any]:
    """Model (fp32, evaluating, on the CPU) and tokenizer of a folder; `experts` computes a fused model's.

    Raises MissingInputError (66) and DataError (65), also when the tokenizer knows more tokens than the model.
    """
    if experts not in NAMES:
        raise UsageError(f"--experts: '{experts}' is none of {', '.join(NAMES)}")
    _ = ModelFolder(folder).specs  # its findings are clearer than transformers'
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder, torch.float32, experts).eval()
    check_tokenizer(model, tokenizer, str(folder))
    return model, tokenizer


def evaluate_model(
    model: Any, tokenizer: Any, encoded: Sequence[Encoded], options: Options | None = None, what: str = "score"
) -> tuple[dict[str, Any], Scores]:
    """The JSON value of one model (`nll`, for an MoE `router`, ..., `records`) and the scores behind it."""
    options = options or Options()
    expert_map = ExpertMap.from_config(model.config)
    tally = RoutingTally(expert_map, encoded, model.config.num_experts_per_tok) if expert_map else None
    scores = score_encoded(
        model,
        encoded,
        observe=tally.observe if tally else None,
        route=route_for(model, expert_map, options.router, [item.record.alignment for item in encoded]),
        alignments=expert_map.alignments if expert_map else (),
        what=what,
    )
    result = _counted(scores, range(len(scores.kept)), tally, options.router)
    if options.exclude_sources:
        result["without"] = {}
    for text in options.exclude_sources:
        places = [i for i, item in enumerate(scores.records) if not of_source(item.source, [text])]
        result["without"][text] = _counted(scores, places, tally, options.router)
    if options.generate:
        result.update(_generated(model, tokenizer, encoded, expert_map, options))
    result["records"] = [_record_entry(item) for item in scores.records]
    result["notes"] = scores.notes
    return result, scores


def _counted(scores: Scores, places: Sequence[int], tally: RoutingTally | None, mode: str) -> dict[str, Any]:
    result: dict[str, Any] = {"nll": summarise([scores.records[i] for i in places])}
    if tally:
        result["router"] = {"mode": mode, **tally.summarise([scores.kept[i] for i in places])}
    if tally and mode != "trained":  # a forced route takes other experts than the router would
        del result["router"]["tokens_per_expert"], result["router"]["load_per_layer"]
    return result


def _generated(
    model: Any, tokenizer: Any, encoded: Sequence[Encoded], expert_map: ExpertMap | None, options: Options
) -> dict[str, Any]:
    chosen = choose([item.record for item in encoded], options.generate)
    ids = {record.id for record in chosen}
    longest = max(item.num_response_tokens for item in encoded if item.record.id in ids)
    route = None
    if options.router != "trained":

        def route(alignment: str) -> Any:
            return route_for_alignment(model, expert_map, options.router, alignment)

    table, samples = exact_match(model, tokenizer, chosen, min(MAX_NEW_TOKENS, longest + 8), route=route)
    return {"exact_match": table, "samples": [_sample_entry(sample) for sample in samples]}


def _record_entry(item: RecordScore) -> dict[str, Any]:
    return {"id": item.id, "alignment": item.alignment, "nll": item.nll_sum, "tokens": item.tokens, "group": item.group}


def _sample_entry(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.record.id,
        "alignment": sample.record.alignment,
        "prompt": sample.record.prompt,
        "expected": sample.record.response,
        "answer": sample.answer.text,
        "exact": sample.exact,
        "experts": [asdict(share) for share in sample.answer.experts],
    }
