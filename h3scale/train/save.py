"""What a training run leaves behind: a dense model folder, or a sharded checkpoint that is complete or not there."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from h3scale import __version__
from h3scale.checkpoint.expected import expected_shapes, stored_as
from h3scale.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from h3scale.checkpoint.shards import TensorSpec, new_folder, sync_one, write_json, write_model
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.data.tokenizer import save_tokenizer
from h3scale.model.families import as_published
from h3scale.model.lora import merged, plain_name, updates_of
from h3scale.train.agree import by_rank_0
from h3scale.train.engine import Run
from h3scale.train.own_files import OwnFiles
from h3scale.train.resume import rank_state, write_rank_state
from h3scale.train.storage import writing

PROBE_TOKENS = 64


def write_folder(run: Run, recipe: TrainRecipe, folder: Path, force: bool = False) -> None:
    """Writes a model that is not sharded (ZeRO-0 to 2) as a Hugging Face folder, which appears when it is complete.

    Values are the optimizer's fp32 master weights, one parameter at a time in memory; rank 0 writes, every rank calls this:
    the masters are spread over the ranks, and so are the experts.
    """
    config = _config(run)
    shapes = expected_shapes(config, folder)
    origins = {name: stored_as(name, run.moe_type) for name in shapes}
    # What comes out of one parameter stands together: it is put together once.
    specs = [TensorSpec(name, shapes[name], torch.float32) for name in sorted(shapes, key=lambda name: origins[name][0])]
    gather = _Gather(run, recipe)
    if run.rank == 0:
        with new_folder(folder, force) as partial:
            write_model(partial, config, specs, lambda name: gather.tensor(*origins[name]), what="save")
            _save_extras(run, recipe, partial)
    else:
        for spec in specs:
            gather.tensor(*origins[spec.name])
    dist.barrier()


class _Gather:
    """Whole tensors of a model under ZeRO-0 to 2, put together on rank 0. All ranks ask for the same ones in the same order."""

    def __init__(self, run: Run, recipe: TrainRecipe):
        self.run = run
        self.scale = recipe.lora.alpha / recipe.lora.rank if recipe.lora else 0.0
        self.parameters = {plain_name(name): parameter for name, parameter in run.engine.module.named_parameters()}
        self.name, self.values = "", torch.empty(0)

    @torch.no_grad()
    def tensor(self, name: str, expert: int | None) -> torch.Tensor:
        """fp32 on the CPU: a parameter, or one expert (of all) of a stacked one. Only rank 0's is meant to be used."""
        if name != self.name:
            self.name, self.values = name, self._whole(name)
        if expert is None:
            return self.values.cpu()
        holder, place = divmod(expert, self.values.shape[0])  # the ranks of the first EP group are 0, 1, ...
        if holder == self.run.rank:
            found = self.values[place].contiguous()
            if holder:
                dist.send(found, 0)
        else:
            found = torch.empty_like(self.values[0])
            if self.run.rank == 0:
                dist.recv(found, holder)
        return found.cpu()

    def _whole(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.parameters[name]
        master = hasattr(parameter, "_hp_mapping")
        values = safe_get_full_fp32_param(parameter) if master else parameter.detach().float()
        return merged(name, values, self.scale, self._whole) if updates_of(name)[0] in self.parameters else values


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint whose files are being written, and the rest of its manifest."""

    folder: Path
    files: OwnFiles
    facts: dict[str, Any]

    def is_writing(self) -> bool:
        """Whether this rank's files are not on disk yet."""
        return self.files.is_writing()

    def finish(self) -> None:
        """Waits for the files of all ranks, and makes the folder a checkpoint by its manifest. Every rank calls this.

        StorageError (74) on every rank where one cannot write; there is no manifest then.
        """
        entries = self.files.agreed()

        def commit() -> None:
            with writing(self.folder):
                write_manifest(self.folder, {**self.facts, "files": entries})
                sync_one(self.folder)

        by_rank_0(commit, f"write {self.folder / MANIFEST}")


def write_checkpoint(
    run: Run,
    recipe: TrainRecipe,
    loader: TypedLoader,
    folder: Path,
    step: int,
    facts: dict[str, Any],
    own: dict[str, torch.Tensor],
    background: bool,
) -> Unfinished:
    """Writes a sharded checkpoint of the model after so many steps, all ranks; it is one when it is finished.

    `background`: what the engine saves is a copy in memory when this returns, and being written.

    Contents: `deepspeed/` (DeepSpeed's own files), `model/` (config, tokenizer), `ranks/` (what each rank alone knows, and
    `own`), `probe.safetensors` (a fixed input and the engine's logits on it, to prove a later conversion), `manifest.json`
    (sizes and sha256 of all files, and `facts`).
    """
    probe = _probe(run, loader)
    by_rank_0(lambda: _make(folder), f"make {folder}")
    files = OwnFiles(folder, staged=background)
    with files.of_deepspeed(run.engine):
        # DeepSpeed's own `latest` may name a torn checkpoint; ours has a manifest or is none.
        run.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=False)
    files.write(rank_state(folder, run.rank), lambda path: write_rank_state(path, own))
    if run.rank == 0:
        files.write(folder / "model", lambda path: _describe(run, recipe, path))
        files.write(folder / "probe.safetensors", lambda path: save_file(probe, path))
    if background:
        files.start()
    sizes = {"world_size": run.world_size, "ep_size": run.ep_size, "zero_stage": run.zero_stage}
    return Unfinished(
        folder, files, {"h3scale": __version__, **sizes, "step": step, "steps": recipe.steps, **facts, "data": loader.state(step)}
    )


def add_to_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """More facts of a checkpoint that is complete. For one rank only."""
    write_manifest(folder, read_manifest(folder) | facts)


def _make(folder: Path) -> None:
    with writing(folder):
        if folder.exists():  # of an attempt that failed and could not be deleted
            shutil.rmtree(folder)
        for name in ("deepspeed", "model", "ranks"):
            (folder / name).mkdir(parents=True)


def _describe(run: Run, recipe: TrainRecipe, folder: Path) -> None:
    write_json(folder / "config.json", _config(run), hide=False)
    _save_extras(run, recipe, folder)


@torch.no_grad()
def _probe(run: Run, loader: TypedLoader) -> dict[str, torch.Tensor]:
    """A fixed input (the first records) and the engine's logits on it. Every rank runs it: experts are spread."""
    ids = (loader.records.tokens[:PROBE_TOKENS] & loader.records.id_mask).tolist()
    input_ids = torch.tensor([ids], device=run.engine.device)
    position_ids = torch.arange(len(ids), device=run.engine.device)[None]
    run.engine.eval()
    output = run.engine(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    run.engine.train()
    return {
        "input_ids": input_ids.cpu(),
        "position_ids": position_ids.cpu(),
        "logits": output.logits.float().cpu().contiguous(),
    }


def _config(run: Run) -> dict[str, Any]:
    config = as_published(run.config.to_dict())
    config["dtype"] = "float32"  # what consolidation writes: the optimizer's own weights
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    config["use_cache"] = True
    config["output_router_logits"] = False
    return {key: value for key, value in config.items() if value is not None or key in ("sliding_window", "bos_token_id")}


def _save_extras(run: Run, recipe: TrainRecipe, folder: Path) -> None:
    save_tokenizer(run.tokenizer, folder)
    generation = {"eos_token_id": run.tokenizer.eos_token_id, "pad_token_id": run.tokenizer.pad_token_id, "do_sample": False}
    write_json(folder / "generation_config.json", generation, hide=False)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
