"""Going on with a run that has not ended: which of its checkpoints, whether it is still the same run, and what it was like there.

On as many ranks, the same ep_size and ZeRO stage, a run that goes on gives the same bits as one that was never interrupted; on
others the same records in the same order, and the same losses but for rounding.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from h3scale.checkpoint.manifest import read_manifest
from h3scale.checkpoint.shards import ModelFolder
from h3scale.checkpoint.training_checkpoint import find_checkpoint
from h3scale.config.deepspeed import read_deepspeed
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.errors import ConfigError, DataError, H3Error, OutputError
from h3scale.exit_status import EXIT_STATUS, checkpoints_in, this_attempt
from h3scale.log import logger
from h3scale.redact import without_secrets
from h3scale.train.agree import by_rank_0
from h3scale.train.engine import Run
from h3scale.train.reshard import load_shards
from h3scale.train.run_facts import read_facts
from h3scale.versions import versions

SAMPLE = 2**20  # bytes at the beginning, the middle and the end of a file
# What may change without anybody being asked: it changes neither the order of the records nor the losses.
FREE = (
    *("out", "ranks", "ep_size", "rows_per_micro_batch", "model", "tokenizer", "deepspeed", "experts"),
    *("tracking", "save", "guards", "collective_timeout_s", "data.prepared"),
)
STAGES = ((0,), (1, 2), (3,))  # of which the runs keep checkpoints and models alike
SHOWN = 12


def open_run_folder(run: Run, run_folder: Path, from_scratch: bool) -> Path | None:
    """The newest checkpoint in the folder that is whole, or None and an empty folder. Every rank calls this.

    A damaged one that is newer is put aside (`.damaged-*`). DataError (65) when there are only damaged ones, OutputError (73)
    when there are other models that a new run would delete.
    """
    found: list[Path] = by_rank_0(lambda: _candidates(run_folder, from_scratch), f"look into {run_folder}")
    findings: list[str] = []
    damaged: list[Path] = []
    for path in found:
        bad = _damage(run, path)
        if not bad:
            break
        damaged.append(path)
        findings += bad
    if damaged == found and found:
        raise DataError([*findings, f"{run_folder}: no checkpoint in it is whole (works: --from-scratch deletes them)"])
    by_rank_0(lambda: _set_aside(damaged, findings) if found else _empty(run_folder), f"get {run_folder} ready")
    return found[len(damaged)] if found else None


def identity_of(recipe: TrainRecipe) -> dict[str, Any]:
    """What makes a run the one it is: the recipe, the ds_config's content, the model that it began with, versions."""
    return {
        "recipe": without_secrets(recipe.model_dump(mode="json")),  # as the manifest has it
        "ds_config": without_secrets(read_deepspeed(recipe.deepspeed)),
        "model": fingerprint(ModelFolder(recipe.model)) if recipe.model else None,
        "versions": versions(),
    }


def fingerprint(folder: ModelFolder) -> str:
    """The sha256 of a model's config, and of the names, sizes and some bytes of its weights: another model is noticed at once."""
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name in sorted(set(folder.files.values())):
        size = (folder.path / name).stat().st_size
        digest.update(f"{name} {size}".encode())
        with (folder.path / name).open("rb") as file:
            for place in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each value of an identity that is another one, but for FREE ones of the recipe."""
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name) and not _is_free(name)]
    return [f"{name.removeprefix('recipe.')}: {old.get(name)} -> {new.get(name)}" for name in names]


def check_same(path: Path, now: dict[str, Any], allow_change: bool) -> None:
    """ConfigError (78) where the run has changed since it was saved; with `allow_change` the changes are told, and taken."""
    found = changes(read_manifest(path)["identity"], now)
    if now["recipe"]["steps"] < read_manifest(path)["step"]:
        raise ConfigError(
            f"{path}: has more than the {now['recipe']['steps']} steps of the recipe (works: steps as before, or more)"
        )
    if not found:
        return
    check_trained(path, now)
    shown = found[:SHOWN] + ([f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])
    if not allow_change:
        advice = "works: as it was, --allow-change to go on with what is new, --from-scratch to begin again"
        raise ConfigError([*(f"since {path}: {line}" for line in shown), f"{path}: the run has changed ({advice})"])
    for line in shown:
        logger.info("changed since %s: %s", path.name, line)


def check_trained(path: Path, now: dict[str, Any]) -> None:
    """ConfigError (78) where other parameters are trained than were, by the recipes: the optimizer knows nothing of those.

    Without ZeRO DeepSpeed reads the optimizer, and wants the same groups: matrices with and without weight decay are two.
    """
    manifest = read_manifest(path)
    old, new = (_what_is_trained(recipe) for recipe in (manifest["identity"]["recipe"], now["recipe"]))
    findings = [f"{key}: {old[key]} -> {new[key]}" for key in ("trainable", "lora") if old[key] != new[key]]
    if manifest["zero_stage"] == 0 and bool(old["decay"]) != bool(new["decay"]):
        findings.append(f"optimizer.weight_decay: {old['decay']} -> {new['decay']}")
    advice = "works: as it was, or a new run from the model of this one"
    if findings:
        raise ConfigError([f"{path}: {finding}: cannot be gone on with, even if allowed ({advice})" for finding in findings])


def _what_is_trained(recipe: dict[str, Any]) -> dict[str, Any]:
    lora = recipe["lora"]
    shape = f"rank {lora['rank']} of {', '.join(sorted(lora['targets']))}" if lora else "none"
    return {
        "trainable": ", ".join(sorted(recipe["trainable"])),
        "lora": shape,
        "decay": recipe["optimizer"]["weight_decay"],
    }


def check_topology(run: Run, path: Path) -> None:
    """ConfigError (78) for a ZeRO stage that leaves another kind of model; ranks and ep_size can be any that the model allows."""
    stage = read_manifest(path)["zero_stage"]
    like = next(stages for stages in STAGES if stage in stages)
    if run.zero_stage not in like:
        works = ", ".join(map(str, like))
        raise ConfigError(f"{path}: was saved with ZeRO stage {stage}, this run has {run.zero_stage} (works: {works})")


def check_order(path: Path, loader: TypedLoader, allow_change: bool) -> None:
    """DataError (65) where the records would now come in another order; with `allow_change` that is told, and taken."""
    try:
        loader.resume(read_manifest(path)["data"])
    except DataError as error:
        if not allow_change:
            raise DataError([*error.findings, f"{path}: --allow-change goes on with the new order"]) from error
        logger.info("changed since %s: the order of the records", path.name)


def load(run: Run, path: Path) -> dict[str, Tensor]:
    """Weights, optimizer and random numbers as they were; gives what else this rank has written down with `write_rank_state`.

    On as many ranks every bit is as it was; on others each rank has the random numbers of one of those that there were.
    """
    manifest = read_manifest(path)
    if run.zero_stage:
        _load_shards(run, path, manifest)
    else:
        _load_whole(run, path)
    state = load_file(rank_state(path, run.rank % manifest["world_size"]))
    torch.set_rng_state(state.pop("rng_cpu"))
    if "rng_cuda" in state:
        torch.cuda.set_rng_state(state.pop("rng_cuda"))
    return state


def _load_shards(run: Run, path: Path, manifest: dict[str, Any]) -> None:
    engine, step, skipped = run.engine, manifest["step"], manifest["progress"]["skips"]["total"]
    if run.zero_stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # small parameters that are held whole are cut again, and gathered below
    load_shards(engine, path / "deepspeed", step - skipped)
    if run.zero_stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    engine.global_steps, engine.skipped_steps = step, skipped
    engine.global_samples, engine.micro_steps = step * engine.train_batch_size(), step * run.micro_batches


def _load_whole(run: Run, path: Path) -> None:
    """Without ZeRO each rank has everything, and DeepSpeed reads it back on any number of them."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in run.engine.optimizer.param_groups]
    found, _ = run.engine.load_checkpoint(str(path), tag="deepspeed", load_lr_scheduler_states=False)
    if found is None:
        raise DataError(f"{path}: DeepSpeed finds nothing in it")
    for group, values in zip(run.engine.optimizer.param_groups, own, strict=True):
        group.update(values)  # of this recipe: what is allowed to change would else come back


def write_rank_state(path: Path, state: dict[str, Tensor]) -> None:
    """Writes what this rank alone knows into a file (`rank_state`) of a checkpoint: its random numbers, and `state`."""
    random = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["rng_cuda"] = torch.cuda.get_rng_state()
    save_file(random | {name: value.cpu().contiguous() for name, value in state.items()}, path)


def trim(path: Path, step: int) -> None:
    """Takes the lines after `step` out of a file of JSON lines, and what follows a torn one; it is missing where it was."""
    if not path.is_file():
        return
    partial = path.with_name(f".partial-{path.name}")
    with path.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # the run was killed while it wrote
                break
            kept.write(line if line.endswith("\n") else f"{line}\n")  # or the next line would be in this one
    partial.replace(path)


def rank_state(path: Path, rank: int) -> Path:
    """Where a checkpoint has what one rank alone knew."""
    return path / "ranks" / f"rank-{rank:05d}.safetensors"


def _candidates(run_folder: Path, from_scratch: bool) -> list[Path]:
    """Checkpoints with a manifest, the newest first. For one rank only."""
    if from_scratch and not _begun_by_this_job(run_folder):
        return []
    found = list(checkpoints_in(run_folder))
    models = (path.parent for path in sorted(run_folder.glob("**/config.json")) if path.parent.name != "model")
    other = next(
        (path for path in models if not path.relative_to(run_folder).as_posix().startswith((".partial-", ".trash-"))), None
    )
    if other and not found:
        raise OutputError(f"{other}: left by a run that did not end (move it away, or --from-scratch to delete it)")
    damaged = next(run_folder.glob(".damaged-*"), None)
    if damaged and not found:
        raise DataError(f"{damaged}: all that is left of a run (works: a copy that is whole in its place, or --from-scratch)")
    return found


def _begun_by_this_job(run_folder: Path) -> bool:
    """Whether Slurm has started a job again that has begun the run: --from-scratch has been done."""
    attempt = this_attempt()
    return bool(attempt["restart"] and read_facts(run_folder).get("begun_by_job", "") == attempt["job"])


def _damage(run: Run, path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; every rank reads its share, and gets all findings."""
    try:
        mine = find_checkpoint(path).check_hashes(run.rank, run.world_size)
    except H3Error as error:
        mine = error.findings
    except OSError as error:  # what cannot be read is as good as broken, and the other ranks are waiting
        mine = [f"{error.filename or path}: {error.strerror}"]
    gathered: list[Any] = [None] * run.world_size
    dist.all_gather_object(gathered, mine)
    return sorted({finding for part in gathered for finding in part})


def _set_aside(damaged: list[Path], findings: list[str]) -> None:
    for finding in findings:
        logger.warning("%s", finding)
    for path in damaged:
        aside = path.with_name(f".damaged-{path.name}")
        if aside.exists():  # where a disk goes bad, the same step may be damaged again
            aside = path.with_name(f"{aside.name}-{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        logger.warning("%s is damaged, and now called %s: the run goes on from an older one", path, aside.name)


def _empty(run_folder: Path) -> None:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        for path in run_folder.iterdir():
            if path.name != EXIT_STATUS:  # this start's
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise OutputError(f"{run_folder}: cannot be made ({error.strerror})") from error


def tidy_up(run_folder: Path) -> None:
    """Removes what an interrupted run has begun and not finished. For one rank only."""
    for path in [*run_folder.glob(".partial-*"), *run_folder.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values


def _is_free(name: str) -> bool:
    return any(name == f"recipe.{free}" or name.startswith(f"recipe.{free}.") for free in FREE)
