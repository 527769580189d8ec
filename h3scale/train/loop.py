"""The training loop: from a recipe to a committed checkpoint. Every rank runs this."""

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h3scale.checkpoint.shards import check_output
from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import Batch
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.data.prepare import prepare, prepared_folder, relevant_alignments
from h3scale.data.store import open_store
from h3scale.errors import H3Error, MissingInputError, PeerLostError, UnsafeError
from h3scale.log import logger, progress
from h3scale.model.router import membership_AE
from h3scale.train.anchor import DriftAnchor
from h3scale.train.engine import Run, set_learning_rate, start
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.metrics import Metrics
from h3scale.train.save import save_checkpoint, save_folder
from h3scale.train.schedule import learning_rate_share


def train(recipe: TrainRecipe, where: str, force: bool = False) -> Path:
    """Runs the recipe and gives the folder of the result.

    A run that shards weights (ZeRO-3) leaves a training checkpoint `out/step-K` for `checkpoint consolidate`; one that does
    not (ZeRO-0 to 2) leaves a Hugging Face folder. `out` must not exist, or be replaced by `force`.
    """
    out = Path(recipe.out)
    _check_place(recipe, out.resolve())
    check_output(out, force)
    seed_everything(recipe.seed)
    run = start(recipe, where)
    loader = make_loader(recipe, run)
    run_folder = out.with_name(f".run-{out.name}")  # becomes `out` when the run has ended well
    if run.rank == 0:
        _fresh(run_folder)
    torch.distributed.barrier()
    metrics = Metrics(run_folder / "metrics.jsonl", loader.alignments, run.engine.device)
    anchor = make_anchor(recipe, run)
    steps_of_run(recipe, run, loader, metrics, anchor)
    if run.zero_stage == 3:
        return save_checkpoint(run, recipe, loader, run_folder, out)
    return save_folder(run, recipe, run_folder, out, force)


def steps_of_run(recipe: TrainRecipe, run: Run, loader: TypedLoader, metrics: Metrics, anchor: DriftAnchor | None) -> None:
    """All optimizer steps of the recipe."""
    tokens_per_step = recipe.data.rows_per_batch * recipe.data.sequence_length
    run.engine.train()
    with progress("train", recipe.steps * tokens_per_step, "tokens") as bar:
        for step in range(recipe.steps):
            batch = loader.batch(step)
            share = learning_rate_share(step, recipe.steps, recipe.optimizer)
            set_learning_rate(run.engine, share)
            counts = Counts(loader.targets_in(batch), loader.tokens_in(batch, recipe.router.vote))
            one_step(recipe, run, loader, batch, counts, metrics, anchor)
            extra = {"lr": recipe.optimizer.learning_rate * share}
            mixed = zip(loader.alignments, loader.tokens_by_alignment(batch).tolist(), strict=True)
            extra |= {f"tokens/{alignment}": tokens for alignment, tokens in mixed}
            line = metrics.close_step(step + 1, counts.targets, counts.votes, loader.tokens_in(batch), extra)
            bar.advance(tokens_per_step, _note(line))


def one_step(
    recipe: TrainRecipe,
    run: Run,
    loader: TypedLoader,
    batch: GlobalBatch,
    counts: Counts,
    metrics: Metrics,
    anchor: DriftAnchor | None,
) -> None:
    """This rank's micro-batches of one global batch, and the optimizer step at the end of them."""
    engine = run.engine
    member_AE = membership_AE(run.expert_map, engine.device) if run.expert_map else None
    parts = run.world_size * run.micro_batches
    for rows in rows_of_rank(batch, run.rank, run.world_size, recipe.rows_per_micro_batch):
        tensors = _to(loader.tensors(rows, run.tokenizer.pad_token_id or 0), engine.device)
        losses = compute_losses(engine, tensors, counts, recipe.router, loader.alignments, member_AE, parts)
        engine.backward(losses.total)  # LM + router
        metrics.add(losses.sums)
        if anchor and anchor.active and engine.is_gradient_accumulation_boundary():
            metrics.add({"drift": anchor.local_sum()})
            anchor.add_gradient()  # on this rank's shard
        engine.step()


def make_anchor(recipe: TrainRecipe, run: Run) -> DriftAnchor | None:
    """The drift anchor of a fused model; None for a dense one."""
    if run.expert_map is None:
        return None
    return DriftAnchor(run.engine, recipe.drift, run.expert_map, run.moe_type, run.config.num_hidden_layers)


def make_loader(recipe: TrainRecipe, run: Run) -> TypedLoader:
    """The typed loader of a run: label order is the model's, or the order in which the records name alignments.

    The first rank prepares records and plan, if that has not been done; the others then open what it made.
    """
    # Preparing may take hours, and a collective of the training's group minutes at most.
    waiting = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))
    told: list[Any] = [None]  # to the other ranks, which wait: the folder, or what went wrong
    failure: Exception | None = None
    if run.rank == 0:
        try:
            folder = prepare(recipe.data, run.tokenizer, prepared_folder(recipe.data, recipe.out)).folder
            _open_loader(recipe, run, folder).check_lengths()
            told = [folder]
        except H3Error as error:
            told = [(type(error), error.findings)]
            failure = error
        except Exception as error:
            told = [(PeerLostError, ["rank 0 failed while it prepared the records"])]
            failure = error
    torch.distributed.broadcast_object_list(told, group=waiting)
    torch.distributed.destroy_process_group(waiting)
    if failure is not None:
        raise failure
    if isinstance(told[0], tuple):
        kind, findings = told[0]
        raise kind(findings)
    loader = _open_loader(recipe, run, told[0])
    if run.rank == 0:
        for step, alignment in loader.plan.ended:
            if step < recipe.steps:  # a plan that was made for a longer run
                logger.warning("%s reaches data.max_epochs at step %d; its share goes to the others", alignment, step)
    return loader


def _open_loader(recipe: TrainRecipe, run: Run, folder: Path) -> TypedLoader:
    if not folder.is_dir():
        raise MissingInputError(
            f"{folder}: prepared by rank 0, not seen by rank {run.rank} (data.prepared must be on shared storage)"
        )
    store = open_store(folder)
    known = run.expert_map.alignments if run.expert_map else None
    alignments = relevant_alignments(store, recipe.data, recipe.alignment, known)
    return TypedLoader(store, recipe.data, seed=recipe.seed, alignments=alignments, steps=recipe.steps)


def seed_everything(seed: int) -> None:
    """The same seed on every rank: nothing drawn here may differ between ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_place(recipe: TrainRecipe, out: Path) -> None:
    """Raises UnsafeError (77) when the output is, or holds, something that the run reads: --force would delete it."""
    records = [source.path for source in recipe.data.records]
    prepared = str(prepared_folder(recipe.data, recipe.out))
    inputs = [name for name in (recipe.model, recipe.tokenizer, *records, prepared) if name]
    inside = [name for name in inputs if Path(name).resolve().is_relative_to(out)]
    if inside or Path.cwd().is_relative_to(out):
        what = f"holds {', '.join(inside)}, which the run reads" if inside else "is a folder you are in"
        raise UnsafeError(f"out: {recipe.out} {what} (choose another folder)")


def _fresh(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def _note(line: dict[str, Any]) -> str:
    parts = [f"{name} {line[name]:.3f}" for name in ("lm", "router", "drift") if name in line]
    accuracy = [value for name, value in line.items() if name.startswith("router_accuracy/")]
    return "  ".join(parts + ([f"right experts {min(accuracy):.0%}+"] if accuracy else []))
