"""What two models compute, in fp32, loaded as anyone would load them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, Report, error, warning
from h3scale.errors import DataError

LOGIT_TOLERANCE = 1e-5  # between fp32 logits of engine and plain transformers; or, where larger, LOGIT_ROUNDING of the largest
LOGIT_ROUNDING = 1e-6  # eight units in the last place of fp32
_NUM_TOKENS = 64  # of the built-in prompt
_SEED = 0


def check_probe(subject: Subject, other: Subject, report: Report) -> Iterator[Finding]:
    """The logits of the trained engine on its probe, which a training checkpoint keeps; a limit where all is fp32, else told."""
    checkpoint = other.checkpoint
    if checkpoint is None or checkpoint.probe is None:
        yield warning(f"{other.path}: has no probe.safetensors, so the logits were not compared (works: --logits)")
        return
    probe = load_file(checkpoint.probe)
    logits = logits_of(subject, probe["input_ids"], probe["position_ids"])
    exact = _dtypes(subject) == {torch.float32} and not other.weights.is_rounded
    yield from _compare(subject, "the trained engine", logits, probe["logits"], exact, report)


def check_logits(subject: Subject, other: Subject, report: Report) -> Iterator[Finding]:
    """The logits of both on one prompt: the probe of either, or token ids drawn with a seed."""
    input_ids, position_ids = _prompt(subject, other)
    theirs = logits_of(other, input_ids, position_ids)
    logits = logits_of(subject, input_ids, position_ids)
    yield from _compare(subject, str(other.path), logits, theirs, _dtypes(subject) == _dtypes(other), report)


def logits_of(subject: Subject, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, S, V) in fp32; DataError (65) when transformers does not load it whole, or cannot run it."""
    is_hub = subject.checkpoint is None and all(origin.tensor == name for name, origin in subject.origins.items())
    model = load_folder(subject.path) if is_hub else _load_tensors(subject)
    try:
        with torch.no_grad():
            return model.eval()(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
    except (RuntimeError, IndexError) as raised:
        raise DataError(f"{subject.path}: transformers loads it, but cannot run it ({_first_line(raised)})") from raised


def load_folder(folder: Path) -> Any:
    """A model folder in the hub's layout as a model of fp32."""
    from transformers import AutoModelForCausalLM

    return _whole(folder, lambda **how: AutoModelForCausalLM.from_pretrained(str(folder), **how))


def _load_tensors(subject: Subject) -> Any:
    """Anything else: its tensors under the hub's names, given to transformers in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{key: value for key, value in subject.config.items() if key != "auto_map"})
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    values = {name: source.values().float() for name, source in subject.sources.items()}
    return _whole(subject.path, lambda **how: kind.from_pretrained(None, config=config, state_dict=values, **how))


def _whole(where: Path, load: Any) -> Any:
    with _quietly():
        try:
            model, info = load(dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError) as raised:
            raise DataError(f"{where}: transformers cannot load it ({_first_line(raised)})") from raised
    lost = {key: value for key, value in info.items() if value}
    if lost:
        raise DataError(f"{where}: transformers did not load it whole: {lost}")
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prompt(subject: Subject, other: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    for each in (other, subject):
        if each.checkpoint is not None and each.checkpoint.probe is not None:
            probe = load_file(each.checkpoint.probe)
            return probe["input_ids"], probe["position_ids"]
    generator = torch.Generator().manual_seed(_SEED)
    rows = min(int(each.config["vocab_size"]) for each in (subject, other))
    length = min([_NUM_TOKENS, *(int(each.config.get("max_position_embeddings", _NUM_TOKENS)) for each in (subject, other))])
    return torch.randint(rows, (1, length), generator=generator), torch.arange(length)[None]


def _compare(
    subject: Subject, than: str, logits: torch.Tensor, theirs: torch.Tensor, exact: bool, report: Report
) -> Iterator[Finding]:
    if logits.shape != theirs.shape:
        yield error(f"{subject.path}: logits {tuple(logits.shape)}, {than} gave {tuple(theirs.shape)}")
        return
    difference = float((logits - theirs).abs().max())
    limit = max(LOGIT_TOLERANCE, LOGIT_ROUNDING * float(theirs.abs().max()))
    report.max_abs_difference, report.logit_limit = difference, limit
    if difference < limit:  # never of an infinite logit
        return
    text = f"{subject.path}: logits differ from those of {than} by {difference:.2e} (limit {limit:.1e})"
    if exact or math.isnan(difference):
        yield error(text)
    else:
        yield warning(f"{text}: expected, since these are not both fp32; look at the weights instead")


def _dtypes(subject: Subject) -> set[torch.dtype]:
    return {spec.dtype for spec in subject.weights.specs.values() if spec.dtype.is_floating_point}


def _first_line(raised: Exception) -> str:
    return (str(raised).splitlines() or [type(raised).__name__])[0][:200]
