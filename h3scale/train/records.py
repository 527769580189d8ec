"""The records of a run: rank 0 prepares them, every rank opens what it made."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h3scale.config.data import Data, Hygiene
from h3scale.config.recipe import Evaluation, TrainRecipe
from h3scale.data.collate import Batch, collate
from h3scale.data.heldout import seen_prompts
from h3scale.data.loader import GlobalBatch, TypedLoader
from h3scale.data.packing import pack
from h3scale.data.prepare import prepare, prepared_folder, relevant_alignments
from h3scale.data.store import Store, Tokens, open_store
from h3scale.errors import DataError, MissingInputError
from h3scale.log import logger
from h3scale.train.agree import by_rank_0
from h3scale.train.engine import Run


def make_loader(recipe: TrainRecipe, run: Run) -> TypedLoader:
    """The typed loader of a run: label order is the model's, or the order in which the records name alignments."""
    folder = _prepared(recipe, run, recipe.data, lambda folder: _open_loader(recipe, run, folder).check_lengths())
    loader = _open_loader(recipe, run, folder)
    if run.rank == 0:
        for step, alignment in loader.plan.ended:
            if step < recipe.steps:  # a plan that was made for a longer run
                logger.warning("%s reaches data.max_epochs at step %d; its share goes to the others", alignment, step)
    return loader


@dataclass(frozen=True)
class HeldOut:
    """Held-out records in packed rows. Labels are indices into `alignments`, in the order of the training's."""

    records: Tokens
    alignments: list[str]
    rows: list[np.ndarray]
    length: int
    prompt_weight: float

    def tensors(self, rows: list[np.ndarray], pad_id: int) -> Batch:
        """Tensors of some rows; an empty one is all padding."""
        return collate(rows, self.records, self.length, pad_id, self.prompt_weight)


def make_held_out(recipe: TrainRecipe, run: Run, loader: TypedLoader) -> HeldOut | None:
    """What `evaluation` names, packed; None without that section. A warning names records whose prompts are trained on."""
    asked = recipe.evaluation
    if asked is None:
        return None
    # of held-out records nothing is left out: what is scored does not depend on settings for training
    hygiene = Hygiene(exact_duplicates=False, near_duplicates=None)
    data = recipe.data.model_copy(update={"records": asked.records, "hygiene": hygiene})
    folder = _prepared(recipe, run, data, lambda folder: _warn(_open_held_out(recipe, asked, run, loader, folder), loader))
    return _open_held_out(recipe, asked, run, loader, folder)


def place(loader: TypedLoader, record: int) -> str:
    """Where a record of the training is from, for people."""
    store = loader.records
    return store.where(record) if isinstance(store, Store) else f"record {record}"


def places(loader: TypedLoader, batch: GlobalBatch) -> list[str]:
    """Where the records of a global batch are from."""
    return [place(loader, record) for record in batch.records.tolist()]


def _prepared(recipe: TrainRecipe, run: Run, data: Data, check: Callable[[Path], Any]) -> Path:
    """The folder of a prepared store. Rank 0 makes it, if that has not been done, and checks it; all ranks raise what it raises."""
    # Preparing may take hours, and a collective of the training's group minutes at most.
    waiting = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))

    def made() -> Path:
        folder = prepare(data, run.tokenizer, prepared_folder(data, recipe.out)).folder
        check(folder)
        return folder

    folder: Path = by_rank_0(made, "prepare the records", waiting)
    torch.distributed.destroy_process_group(waiting)
    return folder


def _open(run: Run, folder: Path) -> Store:
    if not folder.is_dir():
        raise MissingInputError(
            f"{folder}: prepared by rank 0, not seen by rank {run.rank} (data.prepared must be on shared storage)"
        )
    return open_store(folder)


def _open_loader(recipe: TrainRecipe, run: Run, folder: Path) -> TypedLoader:
    store = _open(run, folder)
    known = run.expert_map.alignments if run.expert_map else None
    alignments = relevant_alignments(store, recipe.data, recipe.alignment, known)
    return TypedLoader(store, recipe.data, seed=recipe.seed, alignments=alignments, steps=recipe.steps)


def _open_held_out(recipe: TrainRecipe, asked: Evaluation, run: Run, loader: TypedLoader, folder: Path) -> HeldOut:
    store, length = _open(run, folder), recipe.data.sequence_length
    alignments = relevant_alignments(store, recipe.data, recipe.alignment, loader.alignments)
    records = store.relabelled(alignments)
    usable = (records.labels >= 0) & (records.responses_within(length) > 0)
    by_label = [np.flatnonzero(usable & (records.labels == a))[: asked.records_per_alignment] for a in range(len(alignments))]
    missing = [alignment for alignment, found in zip(alignments, by_label, strict=True) if not len(found)]
    if missing:
        raise DataError([f"evaluation.records: no record of '{a}' fits into sequence_length = {length}" for a in missing])
    chosen = np.concatenate(by_label)
    rows = [chosen[row] for row in pack(records.lengths[chosen].tolist(), length)]
    return HeldOut(records, alignments, rows, length, recipe.data.prompt_weight)


def _warn(held_out: HeldOut, loader: TypedLoader) -> None:
    seen = seen_prompts(held_out.records, loader.records)
    if len(seen) and isinstance(held_out.records, Store):
        logger.warning(
            "evaluation.records: %d of %d held-out prompts are trained on, such as %s (data.hygiene.heldout leaves them out)",
            len(seen), int((held_out.records.labels >= 0).sum()), held_out.records.where(int(seen[0])),
        )  # fmt: skip
