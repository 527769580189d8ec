"""The training loop: from a recipe to a committed checkpoint. Every rank runs this."""

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h3scale.checkpoint.shards import check_output, write_json
from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import Batch
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.data.prepare import prepare, prepared_folder, relevant_alignments
from h3scale.data.store import open_store
from h3scale.errors import H3Error, MissingInputError, PeerLostError, UnsafeError
from h3scale.log import LogFile, libraries_to_file, logger
from h3scale.model.flops import Flops, active_parameters, attended_pairs, training_flops
from h3scale.model.router import membership_AE
from h3scale.train.engine import Run, set_learning_rate, start
from h3scale.train.live import open_view
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.loss_memory import LossMemory, make_loss_memory
from h3scale.train.metrics import Metrics
from h3scale.train.peak import peak_of
from h3scale.train.save import save_checkpoint, save_folder
from h3scale.train.schedule import learning_rate_share
from h3scale.train.timing import timed_all_to_all
from h3scale.train.trackers import Guarded, open_trackers


def train(recipe: TrainRecipe, where: str, force: bool = False) -> Path:
    """Runs the recipe and gives the folder of the result.

    A run that shards weights (ZeRO-3) leaves a training checkpoint `out/step-K` for `checkpoint consolidate`; one that does
    not (ZeRO-0 to 2) leaves a Hugging Face folder. `out` must not exist, or be replaced by `force`.
    """
    out = Path(recipe.out)
    _check_place(recipe, out.resolve())
    check_output(out, force)
    with libraries_to_file() as log_file:
        return _train(recipe, where, out, force, log_file)


def _train(recipe: TrainRecipe, where: str, out: Path, force: bool, log_file: LogFile) -> Path:
    seed_everything(recipe.seed)
    run = start(recipe, where)
    loader = make_loader(recipe, run)
    run_folder = out.with_name(f".run-{out.name}")  # becomes `out` when the run has ended well
    if run.rank == 0:
        _fresh(run_folder)
    torch.distributed.barrier()
    log_file.open(run_folder / "logs" / f"rank-{run.rank}.log")
    metrics, flops = make_metrics(recipe, run, loader, run_folder)
    try:
        steps_of_run(recipe, run, loader, metrics, make_loss_memory(recipe, run), flops)
    finally:
        metrics.close()
    if run.zero_stage == 3:
        return save_checkpoint(run, recipe, loader, run_folder, out)
    return save_folder(run, recipe, run_folder, out, force)


def steps_of_run(recipe: TrainRecipe, run: Run, loader: TypedLoader, metrics: Metrics, memory: LossMemory, flops: Flops) -> None:
    """All optimizer steps of the recipe."""
    run.engine.train()
    window = getattr(run.config, "sliding_window", None)
    metrics.start()
    with timed_all_to_all(metrics.clock):
        for step in range(recipe.steps):
            with metrics.clock.phase("data"):
                batch = loader.batch(step)
            share = learning_rate_share(step, recipe.steps, recipe.optimizer)
            set_learning_rate(run.engine, share)
            counts = Counts(loader.targets_in(batch), loader.tokens_in(batch, recipe.router.vote))
            one_step(recipe, run, loader, batch, counts, metrics, memory)
            tokens = loader.tokens_in(batch)
            needed = flops.of(tokens, attended_pairs(loader.kept[batch.records], window))
            metrics.close_step(step + 1, counts.targets, counts.votes, tokens, _extra(recipe, run, loader, batch, share), needed)


def one_step(
    recipe: TrainRecipe,
    run: Run,
    loader: TypedLoader,
    batch: GlobalBatch,
    counts: Counts,
    metrics: Metrics,
    memory: LossMemory,
) -> None:
    """This rank's micro-batches of one global batch, and the optimizer step at the end of them."""
    engine, clock = run.engine, metrics.clock
    member_AE = membership_AE(run.expert_map, engine.device) if run.expert_map else None
    parts = run.world_size * run.micro_batches
    for rows in rows_of_rank(batch, run.rank, run.world_size, recipe.rows_per_micro_batch):
        with clock.phase("data"):
            tensors = _to(loader.tensors(rows, run.tokenizer.pad_token_id or 0), engine.device)
        with clock.phase("forward"):
            losses = compute_losses(engine, tensors, counts, recipe.router, loader.alignments, member_AE, parts, memory.balance)
            metrics.add(losses.sums)
        with clock.phase("backward"):
            engine.backward(memory.attach(losses.total))  # LM + router
        with clock.phase("step"):
            if engine.is_gradient_accumulation_boundary():
                metrics.add(memory.close_step())  # + drift, on this rank's shard
            engine.step()


def make_metrics(recipe: TrainRecipe, run: Run, loader: TypedLoader, run_folder: Path) -> tuple[Metrics, Flops]:
    """Where the figures go, and what a token costs. `run.json` says what they are measured by."""
    experts = run.expert_map.names() if run.expert_map else []
    flops = training_flops(run.config, recipe.trainable, recipe.lora.targets if recipe.lora else ())
    peak = peak_of(run.engine.device, next(run.engine.module.parameters()).dtype, recipe.tracking.peak_tflops)
    metrics = Metrics(run_folder / "metrics.jsonl", loader.alignments, run.engine.device, experts, peak.flops)
    if run.rank == 0:
        facts = {
            "ranks": run.world_size,
            "peak_flops": peak.flops,
            "peak_source": peak.source,
            "active_parameters": active_parameters(run.config),
            "flops_per_token": flops.per_token,
            "flops_per_attended_pair": flops.per_pair,
        }
        write_json(run_folder / "run.json", facts)
        notes = [f"MFU is of {peak}, ranks: {run.world_size}"]
        metrics.trackers += [
            *open_trackers(recipe, run_folder),
            Guarded("view", lambda: open_view(recipe, loader.alignments, experts, notes)),
        ]
    return metrics, flops


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


def _extra(recipe: TrainRecipe, run: Run, loader: TypedLoader, batch: GlobalBatch, share: float) -> dict[str, Any]:
    """What of a step's line is known without the ranks' sums."""
    extra: dict[str, Any] = {"lr": recipe.optimizer.learning_rate * share}
    norm = run.engine.get_global_grad_norm()  # before clipping; DeepSpeed knows none without ZeRO
    if norm is not None:
        extra["grad_norm"] = float(norm)
    tokens_A = loader.tokens_by_alignment(batch).tolist()
    return extra | {f"tokens/{alignment}": tokens for alignment, tokens in zip(loader.alignments, tokens_A, strict=True)}
