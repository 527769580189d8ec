"""Carries a fusion plan out: streams the tensors into a new folder, starts the router there, then shows the folder."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from h3scale.checkpoint.shards import ModelFolder, check_output, new_folder, write_json, write_model
from h3scale.config.data import Data
from h3scale.config.fuse import FuseRecipe, RouterStart
from h3scale.data.encode import Encoded, encode_records
from h3scale.data.records import Record, split_by_instruction
from h3scale.data.sources import read_records
from h3scale.errors import DataError
from h3scale.fusion.conversation import copy_conversation
from h3scale.fusion.merged import Merger
from h3scale.fusion.parents import Parents
from h3scale.fusion.plan import Plan, PlannedTensor, make_plan
from h3scale.fusion.router_init import cut, fit_router, random_rows, router_accuracy, set_routers
from h3scale.fusion.sources import DenseSource, Source, keep_inputs, open_sources
from h3scale.model.names import EMBEDDINGS, MOE
from h3scale.model.start import load_model, load_tokenizer, placed

REPORT = "fuse_report.json"
MAX_BAD = Data.model_fields["max_bad"].default  # public sets have some bad rows, which training leaves out too
HELD_SHARE = 0.25  # of the fitted records' number: they set the scale


@dataclass(frozen=True)
class RouterReport:
    """How the router started. Accuracies are None when nothing was measured, and for an alignment without records."""

    init: str
    scale: float | None
    token_nll: float | None
    measured_on: str
    accuracy: dict[str, float | None] | None
    random_accuracy: dict[str, float | None] | None


@dataclass(frozen=True)
class Summary:
    """What `fuse` did."""

    out: Path
    plan: Plan
    router: RouterReport


@dataclass(frozen=True)
class StartRecords:
    """Records that fit the rows, records that set the scale, records to measure on and where those come from."""

    fit: list[Record]
    held: list[Record]
    measure: list[Record]
    measured_on: str


def plan_fusion(recipe: FuseRecipe) -> Plan:
    """The plan alone; nothing is written."""
    base, models = open_sources(recipe.base, recipe.models)
    return make_plan(base, models, recipe)


def fuse(recipe: FuseRecipe, force: bool = False, show: Callable[[Plan], None] | None = None) -> Summary:
    """Writes the fused model of a recipe to `recipe.out`, whole or not at all; `show` gets the plan before that.

    Raises OutputError (73) when `out` exists, UnsafeError (77) when replacing it would take an input away,
    MissingInputError (66) and DataError (65) for inputs.
    """
    out = Path(recipe.out)
    check_output(out, force)
    keep_inputs({"base": recipe.base, **{f"models.{label}": path for label, path in recipe.models.items()}}, out)
    base, models = open_sources(recipe.base, recipe.models)
    plan = make_plan(base, models, recipe)
    records = choose_records(recipe.router, plan.expert_map.alignments)
    if show is not None:
        show(plan)
    with new_folder(out, force) as folder:
        sources: dict[str, Source] = {"base": base, **models}
        specs = [planned.spec for planned in plan.tensors]
        merger = _merger(recipe, plan, base, models)
        write_model(folder, plan.config, specs, lambda name: _produce(plan.by_name[name], sources, merger), what="fuse")
        copy_conversation(plan.tokenizer, base.path, folder)
        report = start_router(folder, plan, recipe.router, records)
        write_json(folder / REPORT, _report(plan, report, records))
    return Summary(out, plan, report)


def _merger(recipe: FuseRecipe, plan: Plan, base: DenseSource, models: Mapping[str, Source]) -> Merger | None:
    """What merges the shared tensors, where `shared` is a method."""
    names = tuple(planned.source_name for planned in plan.tensors if planned.action == "merge")
    if not names:
        return None
    return Merger(Parents(base, models, torch.device("cpu")), recipe.shared, recipe.shared_options, names, EMBEDDINGS)


def _produce(planned: PlannedTensor, sources: Mapping[str, Source], merger: Merger | None) -> torch.Tensor:
    spec = planned.spec
    if planned.action == "merge" and merger is not None:
        return merger.source(planned.source_name, spec.dtype).values()
    if planned.action == "router":
        return torch.zeros(spec.shape, dtype=spec.dtype)  # start_router writes it
    tensors = (sources[label].tensor(planned.source_name) for label in planned.sources)
    if planned.action != "average":
        return next(tensors)
    total = torch.zeros(spec.shape, dtype=torch.float32)
    for tensor in tensors:
        total += tensor.float()
    return (total / len(planned.sources)).to(spec.dtype)


def choose_records(start: RouterStart, alignments: tuple[str, ...]) -> StartRecords:
    """The recipe's records, as many of each alignment as it asks for, by its seed; equal instructions stay together.

    Raises DataError (65) for an alignment that has not two records.
    """
    measure = read_records(start.heldout_records, alignments, MAX_BAD) if start.heldout_records else []
    if start.init == "random":
        return StartRecords([], [], measure, "heldout_records" if measure else "nothing")
    everything = read_records(start.records, alignments, MAX_BAD)
    fit: list[Record] = []
    held: list[Record] = []
    findings = []
    for alignment in alignments:
        own = [record for record in everything if record.alignment == alignment]
        random.Random(f"{start.seed}:{alignment}").shuffle(own)
        own = own[: start.records_per_alignment]
        if len(own) < 2:
            findings.append(
                f"{', '.join(source.path for source in start.records)}: alignment '{alignment}' has 1 record (works: 2 or more)"
            )
            continue
        rest, part = split_by_instruction(own, HELD_SHARE, start.seed)
        if not rest or not part:  # too few instructions to cut between them
            number = max(1, round(HELD_SHARE * len(own)))
            rest, part = own[number:], own[:number]
        fit += rest
        held += part
    if findings:
        raise DataError(findings)
    return StartRecords(fit, held, measure or held, "heldout_records" if measure else "records that set the scale")


def start_router(folder: Path, plan: Plan, start: RouterStart, records: StartRecords) -> RouterReport:
    """Loads the folder's model, fits its routers, measures them beside random ones, writes their rows into the folder."""
    dtype = plan.tensors[-1].spec.dtype
    model = placed(load_model(folder, dtype)).eval()

    def encode(chosen: list[Record]) -> list[Encoded]:
        return cut(encode_records(load_tokenizer(folder), chosen), start.max_tokens_per_record) if chosen else []

    fitted = fit_router(model, plan.expert_map, encode(records.fit), encode(records.held), start)
    accuracy = random_accuracy = None
    measured = encode(records.measure)
    if measured:
        set_routers(model, random_rows(model, plan.expert_map, start.seed))
        random_accuracy = router_accuracy(model, measured, plan.expert_map)
        set_routers(model, fitted.weights_LEH)
        accuracy = router_accuracy(model, measured, plan.expert_map)
    del model
    template = MOE[plan.config["model_type"]].hub_router
    rows = {template.format(layer=layer): rows_EH.to(dtype).cpu() for layer, rows_EH in enumerate(fitted.weights_LEH)}
    replace_tensors(folder, rows)
    return RouterReport(start.init, fitted.scale, fitted.token_nll, records.measured_on, accuracy, random_accuracy)


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts new values into the shards that hold these tensors. Routers are planned last, so that is mostly one shard."""
    files = ModelFolder(folder).files
    for file in sorted({files[name] for name in tensors}):
        values = load_file(folder / file)
        values.update({name: tensor.contiguous() for name, tensor in tensors.items() if files[name] == file})
        partial = folder / f".partial-{file}"
        save_file(values, partial, metadata={"format": "pt"})
        shutil.copymode(folder / file, partial)  # save_file makes it readable for its owner only
        partial.replace(folder / file)


def _report(plan: Plan, router: RouterReport, records: StartRecords) -> dict[str, Any]:
    """For fuse_report.json: no dates, no paths."""
    counts = {
        part: {a: sum(r.alignment == a for r in chosen) for a in plan.expert_map.alignments}
        for part, chosen in (("fit", records.fit), ("scale", records.held), ("measured", records.measure))
    }
    return {
        "experts": plan.expert_map.names(),
        "num_parameters": plan.num_parameters,
        "shared": plan.shared,
        "router": {**asdict(router), "records": counts},
    }
