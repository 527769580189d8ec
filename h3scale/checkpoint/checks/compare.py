"""Two models tensor by tensor, whatever their layouts and number formats; a few blocks of each are in memory."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.checks.tensors import EMBEDDINGS, HEAD, blocks, num_workers, rows_of_a_block
from h3scale.checkpoint.extents import Computed, Stored, bytes_of
from h3scale.checkpoint.findings import Finding, Report, error
from h3scale.checkpoint.swaps import swapped
from h3scale.log import progress
from h3scale.model import names

_LISTED = 20  # tensors that are written out


@dataclass(frozen=True)
class _Difference:
    """How two tensors of one shape differ, in the coarser of their formats."""

    dtype: torch.dtype
    num_values: int
    largest: float


def check_against(subject: Subject, other: Subject, report: Report) -> Iterator[Finding]:
    """Every tensor is bit for bit the other model's, both rounded to the coarser of the two number formats."""
    ours, theirs = _without_tied_head(subject), _without_tied_head(other)
    for name in theirs.keys() - ours.keys():
        yield error(f"{subject.path}: {name} is missing, which {other.path} has")
    for name in ours.keys() - theirs.keys():
        yield error(f"{subject.path}: {name} is not in {other.path}")
    shared = [name for name in ours if name in theirs]
    unlike = [name for name in shared if ours[name].shape != theirs[name].shape]
    for name in unlike:
        yield error(f"{subject.path}: {name} is {ours[name].shape}, in {other.path} {theirs[name].shape}")
    alike = [name for name in shared if name not in set(unlike)]
    pairs = {name: (ours[name], theirs[name]) for name in alike}
    with progress("compare", len(pairs), "tensors") as bar, ThreadPoolExecutor(num_workers()) as pool:
        found = {}
        for name, difference in zip(pairs, pool.map(lambda pair: _difference(*pair), pairs.values()), strict=True):
            found[name] = difference
            bar.advance()
    formats = {coarser(one.dtype, two.dtype) for one, two in pairs.values()}
    report.compared_as = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in formats))
    different = {name: difference for name, difference in found.items() if difference.num_values}
    report.num_equal_tensors = len(alike) - len(different)
    yield from map(error, _described(subject, other, pairs, different))


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The number format with fewer digits; of integers and unlike kinds the first."""
    if not (one.is_floating_point and other.is_floating_point):
        return one
    return max(one, other, key=lambda dtype: (torch.finfo(dtype).eps, torch.finfo(dtype).max))


def _without_tied_head(subject: Subject) -> dict[str, Stored | Computed]:
    """The tensors of a model; its head only where it is not the embeddings."""
    is_tied = subject.config.get("tie_word_embeddings") and EMBEDDINGS in subject.sources
    return {name: source for name, source in subject.sources.items() if not (is_tied and name == HEAD)}


def _difference(one: Stored | Computed, other: Stored | Computed) -> _Difference:
    dtype = coarser(one.dtype, other.dtype)
    num_values, largest = 0, 0.0
    count = rows_of_a_block(one, other)
    for ours, theirs in zip(blocks(one, count), blocks(other, count), strict=True):
        mine, yours = ours.to(dtype), theirs.to(dtype)
        unlike = mine != yours
        if dtype.is_floating_point:
            unlike &= ~(mine.isnan() & yours.isnan())
        if unlike.any():
            num_values += int(unlike.sum())
            largest = max(largest, float((mine[unlike].double() - yours[unlike].double()).abs().nan_to_num(torch.inf).max()))
    return _Difference(dtype, num_values, largest)


def _described(
    subject: Subject, other: Subject, pairs: dict[str, tuple[Stored | Computed, Stored | Computed]], found: dict[str, _Difference]
) -> Iterator[str]:
    """What has changed places, in words; the rest one by one, with numbers."""
    ours = {name: _digest(pairs[name][0], difference.dtype) for name, difference in found.items()}
    theirs = {name: _digest(pairs[name][1], difference.dtype) for name, difference in found.items()}
    sentences, explained = swapped(ours, theirs, subject.model_type)
    for sentence in sentences:
        yield f"{subject.path}: {sentence} (by {other.path})"
    rest = [name for name in found if name not in explained]
    for name in rest[:_LISTED]:
        difference, count = found[name], pairs[name][0].numel
        order = _order_of_rows(subject.model_type, name, *pairs[name])
        yield (
            f"{subject.path}: {name} is not what {other.path} holds: {difference.num_values} of {count} values differ, "
            f"by {difference.largest:.3g} at most{order}"
        )
    if len(rest) > _LISTED:
        yield f"{subject.path}: ... and {len(rest) - _LISTED} more tensors that differ"


def _digest(source: Stored | Computed, dtype: torch.dtype) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for values in blocks(source):
        found.update(bytes_of(values.to(dtype)))
    return found.digest()


def _order_of_rows(model_type: str, name: str, one: Stored | Computed, other: Stored | Computed) -> str:
    """Of a router: that its rows, one an expert, are those of the other in another order."""
    moe = names.MOE.get(model_type)
    if moe is None or not names.match(moe.hub_router, name):
        return ""
    dtype = coarser(one.dtype, other.dtype)
    ours, theirs = ([bytes(bytes_of(row)) for row in source.values().to(dtype)] for source in (one, other))
    if sorted(ours) != sorted(theirs):
        return ""
    return f": the same rows in another order, {[theirs.index(row) for row in ours]}"
