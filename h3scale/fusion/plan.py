"""What fuse will write, tensor by tensor, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from h3scale.checkpoint.shards import TensorSpec
from h3scale.config.fuse import FuseRecipe
from h3scale.config.merge import OPTIONS
from h3scale.errors import MissingInputError
from h3scale.fusion.compatible import (
    base_warnings,
    check_fit,
    equal_warnings,
    expected_shapes,
    ffn_names,
    fold,
    full_config,
    shared_warnings,
    tokenizer_folder,
)
from h3scale.fusion.sources import DenseSource, Source
from h3scale.merge.registry import METHODS
from h3scale.model.experts import CONFIG_KEY, SHARED, ExpertMap
from h3scale.model.families import moe_config
from h3scale.model.names import DENSE_FFN, MOE
from h3scale.topology import divisors

Action = Literal["copy", "average", "merge", "expert", "router"]

# transformers writes these into every config; they say nothing about the fused model.
_UNTOLD = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
)


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `sources` are labels ("base" or alignments), `source_name` is its name there ("" for a router)."""

    spec: TensorSpec
    action: Action
    sources: tuple[str, ...]
    source_name: str


@dataclass(frozen=True)
class Row:
    """One line of the printed plan: equal tensors of all layers, or of one expert in all layers."""

    tensor: str
    layers: str
    shape: str
    dtype: str
    sources: str
    action: str


@dataclass(frozen=True)
class Plan:
    """All output tensors in the order they are written (routers last), the config, and what a person should know first.

    `sources` says what each label stands for; `tokenizer` is the folder that it is copied from; `shared` how what is no expert was
    made, with all options.
    """

    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    expert_map: ExpertMap
    sources: dict[str, str]
    tokenizer: Path | None
    warnings: tuple[str, ...]
    shared: dict[str, Any]

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        return {planned.spec.name: planned for planned in self.tensors}

    @property
    def num_parameters(self) -> int:
        return sum(planned.spec.num_bytes // planned.spec.dtype.itemsize for planned in self.tensors)

    def rows(self) -> list[Row]:
        """The plan for reading, folded over layers."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for planned in self.tensors:
            pattern = next(iter(fold([planned.spec.name])))
            key = (pattern, planned.spec.shape, planned.spec.dtype, planned.sources, planned.action)
            groups.setdefault(key, []).append(planned.spec.name)
        return [
            Row(
                tensor=pattern,
                layers=fold(names)[pattern],
                shape=" x ".join(map(str, shape)),
                dtype=str(dtype).removeprefix("torch."),
                sources=", ".join(sources),
                action=action,
            )
            for (pattern, shape, dtype, sources, action), names in groups.items()
        ]

    def text(self) -> str:
        """What a person reads before it happens: the sources, a line for each row, the experts, the warnings."""
        cells = [("tensor", "layers", "shape", "dtype", "from", "what")]
        cells += [(row.tensor, row.layers, row.shape, row.dtype, row.sources, row.action) for row in self.rows()]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [f"{label}: {source}" for label, source in self.sources.items()]
        lines.append(f"tokenizer: {self.tokenizer or 'none'}")
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        experts = ", ".join(f"{i} = {name}" for i, name in enumerate(self.expert_map.names()))
        top_k = self.config["num_experts_per_tok"]
        lines.append(f"{self.num_parameters:,} parameters; each token goes to {top_k} of the experts {experts}")
        lines.append(spread(self.expert_map))
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def spread(expert_map: ExpertMap) -> str:
    """Over how many ranks the experts can be spread, and how many general ones would let all usual numbers of GPUs do."""
    count = expert_map.num_experts
    line = f"{count} experts can be trained with ep_size {', '.join(map(str, divisors(count)))}"
    power = 1 << (count - 1).bit_length()
    if power == count:
        return line
    general = expert_map.experts.count(None) + power - count
    return f"{line} (general_experts: {general} makes {power} of them: {', '.join(map(str, divisors(power)))})"


def make_plan(base: DenseSource, models: Mapping[str, Source], recipe: FuseRecipe) -> Plan:
    """Checks that the sources fit together and lists every output tensor. Reads weights only to compare them.

    Raises DataError (65) with all findings at once; MissingInputError (66) when the router start needs a tokenizer and
    no folder has one.
    """
    expert_map = ExpertMap.of(models, recipe.experts_per_alignment, recipe.general_experts)
    # Of an unknown family nothing more can be said.
    moe_config(base.folder.config, expert_map, recipe.top_k, where=str(base.path))
    dense = full_config(base.folder)
    shapes, tied = expected_shapes(dense)
    check_fit(base, models, dense, shapes, tied)
    config = {key: value for key, value in dense.to_dict().items() if key not in _UNTOLD}
    config = moe_config(config, expert_map, recipe.top_k, where=str(base.path))
    if recipe.shared in OPTIONS:
        config[CONFIG_KEY][SHARED] = _provenance(recipe, models)  # where training and consolidation leave it
    ffn = ffn_names(config["num_hidden_layers"])
    shared = [name for name in shapes if name not in tied and name not in ffn]
    warnings = base_warnings(models) + equal_warnings(base, models, ffn)
    if recipe.shared == "base":
        warnings += shared_warnings(models, shared)
    return Plan(
        tensors=tuple(
            _shared(base, models, recipe, shared) + _experts(base, expert_map, config) + _routers(base, expert_map, config)
        ),
        config=config,
        expert_map=expert_map,
        sources={source.label: f"{source.kind} {source.path}" for source in (base, *models.values())},
        tokenizer=_tokenizer(base, models, recipe),
        warnings=tuple(warnings),
        shared={"method": recipe.shared, **(recipe.shared_options.model_dump() if recipe.shared in OPTIONS else {})},
    )


def _shared(base: DenseSource, models: Mapping[str, Source], recipe: FuseRecipe, names: list[str]) -> list[PlannedTensor]:
    actions: dict[str, Action] = {"base": "copy", "average": "average"}
    action = actions.get(recipe.shared, "merge")
    sources = ("base",) if recipe.shared == "base" else tuple(models)
    return [PlannedTensor(base.specs[name], action, sources, name) for name in names]


def _provenance(recipe: FuseRecipe, models: Mapping[str, Source]) -> dict[str, Any]:
    """For the model card: how what is no expert was merged, without paths."""
    method, options = METHODS[recipe.shared], recipe.shared_options
    pairs = zip(models.values(), options.weights_of(len(models)), strict=True)
    return {
        "method": recipe.shared,
        "title": method.title,
        "paper": method.paper,
        "options": options.model_dump(exclude={"weights"}),
        "models": {source.label: {"kind": source.kind, "weight": weight} for source, weight in pairs},
    }


def _experts(base: DenseSource, expert_map: ExpertMap, config: dict[str, Any]) -> list[PlannedTensor]:
    templates = MOE[config["model_type"]].hub_experts
    planned = []
    for layer in range(config["num_hidden_layers"]):
        for expert, alignment in enumerate(expert_map.experts):
            for projection, template in templates.items():
                source_name = DENSE_FFN[projection].format(layer=layer)
                source = base.specs[source_name]
                spec = TensorSpec(template.format(layer=layer, expert=expert), source.shape, source.dtype)
                planned.append(PlannedTensor(spec, "expert", (alignment or "base",), source_name))
    return planned


def _routers(base: DenseSource, expert_map: ExpertMap, config: dict[str, Any]) -> list[PlannedTensor]:
    template = MOE[config["model_type"]].hub_router
    shape = (expert_map.num_experts, config["hidden_size"])
    dtype = base.specs[DENSE_FFN["gate"].format(layer=0)].dtype
    specs = [TensorSpec(template.format(layer=layer), shape, dtype) for layer in range(config["num_hidden_layers"])]
    return [PlannedTensor(spec, "router", (), "") for spec in specs]


def _tokenizer(base: DenseSource, models: Mapping[str, Source], recipe: FuseRecipe) -> Path | None:
    folder = tokenizer_folder([base.path, *(source.path for source in models.values())])
    if folder is None and (recipe.router.init != "random" or recipe.router.heldout_records):
        raise MissingInputError(f"{base.path}: no tokenizer here or beside an aligned model, and the router start needs one")
    return folder
