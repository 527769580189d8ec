"""A model on disk, whatever wrote it and in whatever layout: tensors by their names in the hub layout, none of them read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h3scale.checkpoint.expected import differences, expected_shapes
from h3scale.checkpoint.extents import Computed, Stored, Weights
from h3scale.checkpoint.layouts import find_layout, matrix, transpose
from h3scale.checkpoint.lora import open_weights
from h3scale.checkpoint.shard_files import INDEX, WEIGHTS
from h3scale.checkpoint.shards import ModelFolder
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint, find_checkpoint
from h3scale.errors import DataError, MissingInputError
from h3scale.model import names
from h3scale.model.families import num_experts
from h3scale.model.names import Origin

FOLDER = "Hugging Face folder"
COMPUTED_ANYWAY = "rotary_emb.inv_freq"  # a buffer that old checkpoints store


@dataclass(frozen=True)
class SourceModel:
    """`path` is what was found (of a run, a step), `folder` has config.json and tokenizer, `layout` is None for a dense model.

    `shapes`: of all tensors that the config asks for, by their names in the hub layout; exactly these are there. `tokenizer`:
    the folder that has it, where that is not `folder`.
    """

    path: Path
    folder: Path
    config: dict[str, Any]
    weights: Weights
    layout: str | None
    step: int | None
    shapes: dict[str, tuple[int, ...]]
    tokenizer: Path | None = None

    @property
    def moe(self) -> names.MoeNames | None:
        return names.MOE.get(self.config.get("model_type", ""))

    @property
    def num_experts(self) -> int:
        return num_experts(self.config) or 0

    def origin(self, name: str) -> Origin:
        """Where a tensor is: in which stored one, and of an expert where in it."""
        return names.locate(self.moe, self.layout, name) if self.moe and self.layout else Origin(name)

    def source(self, name: str, transposed: bool = False) -> Stored | Computed:
        """What a tensor is made of; a matrix (in, out) when `transposed`."""
        origin = self.origin(name)
        found = self.weights.source(origin.tensor)
        if origin.place is not None and origin.expert is not None:
            return matrix(_stored(found, name), origin.place, origin.expert, self.num_experts, transposed)
        return transpose(_stored(found, name)) if transposed else found

    def values(self, name: str) -> Any:
        """The tensor, read now."""
        return self.source(name).values().view(self.shapes[name])


def open_model(path: str | Path, config_from: str | Path | None = None) -> SourceModel:
    """A model folder in any layout, or a training checkpoint; `config_from`: a folder with its config and tokenizer.

    Raises MissingInputError (66) when nothing of the kind is there, DataError (65) when tensors are missing, unknown, of
    another shape, or in several layouts, UnsafeError (77) for what could run code or leads outside the folder.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path}: no such file or folder")
    if is_model_folder(path):
        return open_folder(ModelFolder(path, config_from))
    return open_training(find_checkpoint(path, config_from))


def is_model_folder(path: Path) -> bool:
    """Whether there are safetensors weights in it."""
    return path.is_dir() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def open_folder(folder: ModelFolder) -> SourceModel:
    """A folder of safetensors."""
    return checked(folder.path, folder.config_from, folder.config, folder_weights(folder))


def folder_weights(folder: ModelFolder) -> Weights:
    """The tensors of a folder. What a tied or old model has on disk beyond its config is left out."""
    tied = "lm_head.weight" if folder.config.get("tie_word_embeddings") else None
    entries = {n: e for n, e in folder.entries.items() if n != tied and not n.endswith(COMPUTED_ANYWAY)}
    return Weights(folder.path, FOLDER, world_size=1, ep_size=1, is_rounded=False, entries=entries)


def open_training(checkpoint: TrainingCheckpoint) -> SourceModel:
    """A training checkpoint, with the sizes of its files as its manifest has them."""
    checkpoint.check_sizes()
    weights = open_weights(checkpoint.deepspeed, checkpoint.model)
    step = (checkpoint.manifest or {}).get("step")
    return checked(checkpoint.path, checkpoint.model, checkpoint.config, weights, step)


def checked(path: Path, folder: Path, config: dict[str, Any], weights: Weights, step: int | None = None) -> SourceModel:
    """The model, when its tensors are those that the config asks for; else DataError (65) with every difference."""
    layout = find_layout(config.get("model_type"), weights.specs, weights.folder)
    shapes = expected_shapes(config, folder)
    model = SourceModel(path, folder, config, weights, layout, step, shapes)
    wanted = stored_shapes(shapes, config.get("model_type"), layout, model.num_experts)
    found = {name: spec.shape for name, spec in weights.specs.items()}
    found |= {alias: found[name] for alias, name in weights.aliases.items() if alias in wanted and name in found}
    findings = differences(found, wanted, weights.folder, config.get("model_type", ""))
    if findings:
        raise DataError(findings)
    return model


def stored_shapes(
    shapes: dict[str, tuple[int, ...]], model_type: str | None, layout: str | None, num_experts: int
) -> dict[str, tuple[int, ...]]:
    """The tensors that a layout has for those of the hub layout."""
    moe = names.MOE.get(model_type or "")
    if moe is None or layout is None:
        return shapes
    origins = ((names.locate(moe, layout, name), shape) for name, shape in shapes.items())
    return {o.tensor: o.place.tensor_shape(shape, num_experts) if o.place else shape for o, shape in origins}


def _stored(found: Stored | Computed, name: str) -> Stored:
    if isinstance(found, Computed):
        raise DataError(f"{name}: is computed (LoRA), and cannot be turned around or cut")
    return found
