"""What a checkpoint or model on disk is: read from names, headers and configs; of its tensors not one value."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from h3scale.checkpoint.adapter import Adapter
from h3scale.checkpoint.expected import differences, expected_shapes
from h3scale.checkpoint.extents import Stored, Weights
from h3scale.checkpoint.find_model import is_adapter
from h3scale.checkpoint.h3fusion import read_h3fusion
from h3scale.checkpoint.layouts import find_layout
from h3scale.checkpoint.manifest import read_manifest
from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.checkpoint.source_model import folder_weights, is_model_folder, stored_shapes
from h3scale.checkpoint.tag_folder import UNIVERSAL
from h3scale.checkpoint.training_checkpoint import MODEL, TrainingCheckpoint, find_checkpoint, steps_of
from h3scale.checkpoint.vocabulary import has_vocabulary
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.errors import H3Error, MissingInputError
from h3scale.model import names
from h3scale.model.experts import ExpertMap
from h3scale.model.families import num_experts
from h3scale.model.lora import is_update


@dataclass
class Inspection:
    """What lies at a path. `None` and empty: does not apply, or cannot be known without a config.

    `dtypes`: parameters by number format. `files`: by kind, [how many, bytes]. `findings`: what does not fit the config.
    """

    path: str
    kind: str
    step: int | None = None
    steps: list[int] = field(default_factory=list)
    best_step: int | None = None
    world_size: int | None = None
    ep_size: int | None = None
    model_type: str | None = None
    layout: str | None = None
    num_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    alignments: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_parameters: int = 0
    num_active_parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    vocab_size: int | None = None
    has_tokenizer: bool | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"num_bytes": self.num_bytes}


def inspect(path: str | Path, config_from: str | Path | None = None) -> Inspection:
    """What lies at a path: a model folder, a run, a step, a tag folder, a universal checkpoint, an adapter, a moe.pt.

    Raises MissingInputError (66) where nothing of the kind is, DataError (65) for files that cannot be read, UnsafeError (77)
    for those that could run code.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path}: no such file or folder")
    if is_adapter(path):
        return _adapter(path)
    if path.is_file():
        return _with_model(_of(path, read_h3fusion(path)), read_h3fusion(path), Path(config_from) if config_from else None)
    if is_model_folder(path):
        folder = ModelFolder(path, config_from)
        weights = folder_weights(folder)
        return _with_model(_of(path, weights), weights, folder.config_from)
    return _training(path, config_from)


def _training(path: Path, config_from: str | Path | None) -> Inspection:
    checkpoint = find_checkpoint(path, config_from or path)  # a bare tag folder can be told without a config
    weights = open_deepspeed(checkpoint.deepspeed)
    found = _of(checkpoint.path, weights)
    steps = steps_of(path) if path != checkpoint.path else []
    best = [step for step in steps if read_manifest(step).get("best")]
    found.steps = [_number(step) for step in steps]
    found.best_step = _number(best[-1]) if best else None
    found.step = (checkpoint.manifest or {}).get("step", weights.step)
    found.world_size, found.ep_size = weights.world_size, weights.ep_size
    folder = _model_folder(checkpoint, config_from)
    if folder is not None and any(is_update(name) for name in weights.entries):
        found.adapter = (read_json(folder / "recipe.json").get("lora") or {}) if (folder / "recipe.json").is_file() else {}
        found.kind += " with LoRA updates"
        _describe(found, folder, read_json(folder / "config.json"), weights)
        return found
    return _with_model(found, weights, folder)


def _model_folder(checkpoint: TrainingCheckpoint, config_from: str | Path | None) -> Path | None:
    """Where the config is; a bare tag folder has none."""
    if config_from:
        return Path(config_from)
    return checkpoint.path / MODEL if checkpoint.manifest is not None else None


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step-"))


def _adapter(path: Path) -> Inspection:
    adapter = Adapter(path)
    pairs = [stored for pair in adapter.pairs.values() for stored in pair.values()]
    found = _counted(Inspection(str(path), "PEFT adapter", files=_files(path)), [*pairs, *adapter.embeddings.values()])
    config = adapter.config
    found.adapter = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path")}
    found.adapter["matrices"] = dict(Counter(name.removesuffix(".weight").rsplit(".", 1)[-1] for name in adapter.pairs))
    found.has_tokenizer = has_vocabulary(path)
    return found


def _of(path: Path, weights: Weights) -> Inspection:
    return _counted(Inspection(str(path), weights.kind, files=_files(path)), weights.entries.values())


def _counted(found: Inspection, tensors: Iterable[Stored]) -> Inspection:
    dtypes: Counter[str] = Counter()
    for stored in tensors:
        dtypes[str(stored.dtype).removeprefix("torch.")] += stored.numel
        found.num_tensors += 1
    found.dtypes, found.num_parameters = dict(dtypes), dtypes.total()
    return found


def _with_model(found: Inspection, weights: Weights, folder: Path | None) -> Inspection:
    """With what the config says, and where the tensors are not what it asks for."""
    if folder is None:
        return found
    config = read_json(folder / "config.json")
    _describe(found, folder, config, weights)
    if found.kind.startswith("H3Fusion") and found.model_type not in names.MOE:
        return found  # the config is the base's, which is no mixture yet
    try:
        wanted = stored_shapes(expected_shapes(config, folder), found.model_type, found.layout, found.num_experts or 0)
        there = {name: spec.shape for name, spec in weights.specs.items()}
        found.findings += differences(there | _aliases(weights, wanted), wanted, found.path, found.model_type or "")
    except H3Error as error:
        found.findings += error.findings
    return found


def _aliases(weights: Weights, wanted: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        alias: weights.specs[name].shape for alias, name in weights.aliases.items() if alias in wanted and name in weights.specs
    }


def _describe(found: Inspection, folder: Path, config: dict[str, Any], weights: Weights) -> None:
    found.model_type = config.get("model_type")
    found.num_layers, found.vocab_size = config.get("num_hidden_layers"), config.get("vocab_size")
    found.has_tokenizer = has_vocabulary(folder)
    found.num_experts, found.top_k = num_experts(config), config.get("num_experts_per_tok")
    expert_map = ExpertMap.from_config(config)
    if expert_map:
        found.alignments, found.experts = list(expert_map.alignments), expert_map.names()
    try:
        found.layout = find_layout(found.model_type, weights.specs, weights.folder)
    except H3Error as error:
        found.findings += error.findings
    experts = _expert_parameters(found.model_type, found.layout, weights)
    if found.num_experts and found.top_k:
        found.num_active_parameters = found.num_parameters - experts + experts * found.top_k // found.num_experts


def _expert_parameters(model_type: str | None, layout: str | None, weights: Weights) -> int:
    if layout is None:
        return 0
    templates = [place.template for place in names.MOE[model_type or ""].layouts[layout].experts.values()]
    return sum(
        prod(spec.shape)
        for name, spec in weights.specs.items()
        if any(names.match(template, name) is not None for template in templates)
    )


_KINDS = (
    ("optimizer states", lambda file: file.name.endswith("_optim_states.pt")),
    ("model states", lambda file: file.name.endswith("_model_states.pt")),
    ("universal", lambda file: file.parent.parent.name == UNIVERSAL and file.suffix == ".pt"),
    ("weights", lambda file: file.suffix in (".safetensors", ".pt")),
)


def _files(path: Path) -> dict[str, list[int]]:
    """By kind, how many files and how many bytes."""
    found: dict[str, list[int]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            kind = next((kind for kind, matches in _KINDS if matches(file)), "other")
            entry = found.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += file.stat().st_size
    return found
