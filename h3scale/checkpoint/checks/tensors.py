"""The tensors of a model: those that its config asks for, with values that a training can have left."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.expected import differences
from h3scale.checkpoint.extents import BLOCK_BYTES, Computed, Stored, bytes_of
from h3scale.checkpoint.findings import Finding, Report, error, warning
from h3scale.checkpoint.source_model import COMPUTED_ANYWAY
from h3scale.checkpoint.swaps import in_layers
from h3scale.errors import DataError
from h3scale.log import progress
from h3scale.model import names
from h3scale.model.experts import ExpertMap

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
MAX_WORKERS = 8


def check_names(subject: Subject, report: Report) -> Iterator[Finding]:
    """Names and shapes are those that config.json asks for, in one of the layouts."""
    specs = subject.weights.specs
    report.num_tensors = len(specs)
    report.num_parameters = sum(prod(spec.shape) for spec in specs.values())
    report.dtypes = sorted({_word(spec.dtype) for spec in specs.values()})
    if not subject.has_config:
        return
    wanted = subject.wanted
    found = {name: spec.shape for name, spec in specs.items() if not name.endswith(COMPUTED_ANYWAY)}
    found |= {alias: found[name] for alias, name in subject.weights.aliases.items() if alias in wanted and name in found}
    if HEAD not in wanted and found.get(HEAD) == wanted.get(EMBEDDINGS):
        found.pop(HEAD, None)  # tied, and stored as well: check_values compares the two
    yield from map(error, differences(found, wanted, subject.path, subject.model_type))


def check_dtype(subject: Subject) -> Iterator[Finding]:
    """config.json says in which number format most of the values are."""
    says = subject.config.get("dtype", subject.config.get("torch_dtype"))
    if says is None or "quantization_config" in subject.config:
        return
    sizes: dict[str, int] = {}
    for spec in subject.weights.specs.values():
        if spec.dtype.is_floating_point:
            sizes[_word(spec.dtype)] = sizes.get(_word(spec.dtype), 0) + spec.num_bytes
    most = max(sizes, key=sizes.__getitem__, default=None)
    if most and str(says).removeprefix("torch.") != most:
        yield error(f"{subject.model / 'config.json'}: dtype: {says}, but the tensors are {most}")


@dataclass(frozen=True)
class _Values:
    """What is known of the values of one tensor. `lost`: why they could not be read."""

    digest: bytes = b""
    num_bad: int = 0
    is_zero: bool = False
    lost: str = ""


def check_values(subject: Subject) -> Iterator[Finding]:
    """No NaN, no infinity, no matrix of zeros; tied tensors that are stored twice are equal.

    Experts with the same weights are a warning, no error: copies that training has yet to part, or a general expert that
    is the base, are made on purpose; by mistake, as in what H3Fusion published, the router's choice means nothing.
    """
    sources = subject.sources
    with progress("verify", len(sources), "tensors") as bar, ThreadPoolExecutor(num_workers()) as pool:
        for name, values in zip(sources, pool.map(_look_at, sources.values()), strict=True):
            bar.advance()
            if values.lost:
                if not any(header.findings for header in subject.headers.values()):  # else it has been said
                    yield error(f"{name}: {values.lost}")
                continue
            subject.digests[name] = values.digest
            if values.num_bad:
                yield error(f"{subject.path}: {name} has {values.num_bad} values that are NaN or infinite")
            yield from _zeros(subject, name, values)
    yield from map(warning, _twins(subject))
    found = subject.digests
    is_tied = subject.config.get("tie_word_embeddings") and {HEAD, EMBEDDINGS} <= found.keys()
    if is_tied and sources[HEAD].dtype == sources[EMBEDDINGS].dtype and found[HEAD] != found[EMBEDDINGS]:
        yield error(f"{subject.path}: {HEAD} and {EMBEDDINGS} are tied (tie_word_embeddings), but differ")


def blocks(source: Stored | Computed, count: int = 0) -> Iterator[torch.Tensor]:
    """The values of a tensor, `count` rows at a time (by default `rows_of_a_block`), read one after another."""
    shape = source.shape or (1,)
    whole = source.viewed(shape) if isinstance(source, Stored) else source
    step = count or rows_of_a_block(source)
    for start in range(0, shape[0], step):
        rows = whole.rows(start, min(start + step, shape[0]))
        yield rows.values() if isinstance(rows, Stored) else rows


def rows_of_a_block(*sources: Stored | Computed) -> int:
    """Rows that are read together, of tensors of one shape: as many as a writer computes together, or as fill BLOCK_BYTES.

    A product (LoRA) of other sizes may round otherwise; what lies transposed wants larger blocks.
    """
    computed = [source for source in sources if isinstance(source, Computed)]
    products = [source for source in computed if source.block_bytes is None]
    widest = max(source.dtype.itemsize for source in products or sources)
    budget = BLOCK_BYTES if products else max([BLOCK_BYTES, *(source.block_bytes or 0 for source in computed)])
    return max(1, budget // max(prod(sources[0].shape[1:]) * widest, 1))


def num_workers() -> int:
    """Threads that read at the same time."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def _look_at(source: Stored | Computed) -> _Values:
    digest, num_bad, is_zero = hashlib.blake2b(digest_size=16), 0, source.numel > 0
    try:
        for values in blocks(source):
            digest.update(bytes_of(values))
            is_zero = is_zero and not bool(values.any())
            if values.is_floating_point():
                num_bad += int((~torch.isfinite(values)).sum())
    except DataError as raised:
        return _Values(lost=raised.findings[0])
    return _Values(digest.digest(), num_bad, is_zero)


def _zeros(subject: Subject, name: str, values: _Values) -> Iterator[Finding]:
    """A finding on a tensor of zeros. Biases may be; routers and updates (LoRA) begin so, of which it is told."""
    moe = names.MOE.get(subject.model_type)
    if not values.is_zero or name.endswith(".bias"):
        return
    if moe and names.match(moe.hub_router, name):
        yield warning(f"{subject.path}: {name} is all zeros: every expert is as likely as any other")
    elif ".lora_" in name:
        yield warning(f"{subject.path}: {name} is all zeros: the update changes nothing")
    else:
        yield error(f"{subject.path}: {name} is all zeros: its values were lost")


def _twins(subject: Subject) -> Iterator[str]:
    """A line for each pair of experts with equal weights."""
    moe = names.MOE.get(subject.model_type)
    prints: dict[tuple[int, int], dict[str, bytes]] = {}
    for name, digest in subject.digests.items():
        for projection, template in (moe.hub_experts if moe else {}).items():
            found = names.match(template, name)
            if found is not None:
                prints.setdefault((found["layer"], found["expert"]), {})[projection] = digest
    first: dict[tuple[int, tuple[tuple[str, bytes], ...]], int] = {}
    pairs: dict[tuple[int, int], list[int]] = {}
    for (layer, expert), parts in sorted(prints.items()):
        twin = first.setdefault((layer, tuple(sorted(parts.items()))), expert)
        if twin != expert:
            pairs.setdefault((twin, expert), []).append(layer)
    expert_map = ExpertMap.from_config(subject.config)
    of = expert_map.experts if expert_map else ()
    for (one, other), layers in pairs.items():
        copies = " (copies of one FFN, which training parts)" if of and of[one] == of[other] else ""
        yield f"{subject.path}: experts {one} and {other} have identical weights in {in_layers(layers)}{copies}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
