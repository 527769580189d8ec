"""What a run's figures are measured by: the cost of a token, the device's peak, and run.json, which says so."""

import uuid
from pathlib import Path
from typing import Any

from h3scale.checkpoint.shards import read_json, write_json
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.errors import DataError, MissingInputError
from h3scale.exit_status import FACTS, this_attempt
from h3scale.log import logger
from h3scale.model.flops import Flops, active_parameters, training_flops
from h3scale.train.engine import Run
from h3scale.train.live import open_view
from h3scale.train.metrics import Metrics
from h3scale.train.peak import peak_of
from h3scale.train.storage import model_bytes, writing
from h3scale.train.trackers import Guarded, open_trackers
from h3scale.train.watch import Watch


def make_metrics(
    recipe: TrainRecipe, run: Run, loader: TypedLoader, run_folder: Path, resumed_after: int | None = None
) -> tuple[Metrics, Flops]:
    """Where the figures go, and what a token costs. `run.json` says what they are measured by, and which run it is.

    `resumed_after`: steps of a run that goes on.
    """
    first_step = resumed_after or 0
    experts = run.expert_map.names() if run.expert_map else []
    alignment_of = dict(zip(experts, run.expert_map.experts, strict=True)) if run.expert_map else {}
    flops = training_flops(run.config, recipe.trainable, recipe.lora.targets if recipe.lora else ())
    peak = peak_of(run.engine.device, next(run.engine.module.parameters()).dtype, recipe.tracking.peak_tflops)
    watch = Watch(recipe.guards, alignment_of)
    metrics = Metrics(run_folder / "metrics.jsonl", loader.alignments, run.engine.device, experts, peak.flops, watch)
    if run.rank == 0:
        facts: dict[str, Any] = {
            "ranks": run.world_size,
            "peak_flops": peak.flops,
            "peak_source": peak.source,
            "active_parameters": active_parameters(run.config),
            "flops_per_token": flops.per_token,
            "flops_per_attended_pair": flops.per_pair,
            "model_bytes": model_bytes(recipe, run),
        }
        begun = {"run_id": uuid.uuid4().hex[:8], "begun_by_job": this_attempt()["job"], "resumed_after": []}
        before = begun | read_facts(run_folder)
        facts = before | facts | {"resumed_after": [*before["resumed_after"], *([] if resumed_after is None else [resumed_after])]}
        with writing(run_folder):
            write_json(run_folder / FACTS, facts)
        notes = [f"MFU is of {peak}, ranks: {run.world_size}"]
        metrics.trackers += [
            *open_trackers(recipe, run_folder, facts["run_id"], first_step),
            Guarded("view", lambda: open_view(recipe, loader.alignments, experts, notes, first_step)),
        ]
    return metrics, flops


def add_facts(run_folder: Path, facts: dict[str, Any]) -> None:
    """More of what run.json says. For one rank only."""
    write_json(run_folder / FACTS, read_facts(run_folder) | facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where it is not there, or was torn by a disk: that is no reason to lose a run."""
    try:
        return read_json(folder / FACTS)
    except MissingInputError:
        return {}
    except DataError as error:
        logger.warning("%s, and is written anew", error)
        return {}
