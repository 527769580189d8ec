"""From any layout, or a training checkpoint, to any other layout: every matrix of every expert exactly once."""

from pathlib import Path
from typing import Any

from h3scale.checkpoint.expected import differences, expected_shapes, full_config
from h3scale.checkpoint.find_model import find_model
from h3scale.checkpoint.layouts import stack
from h3scale.checkpoint.model_writer import Options, Plan, Summary, output, write_model_folder
from h3scale.checkpoint.shards import check_output
from h3scale.checkpoint.source_model import SourceModel
from h3scale.checkpoint.stream import Piece
from h3scale.checkpoint.universal_writer import write_universal
from h3scale.errors import DataError, UsageError
from h3scale.model.experts import ExpertMap
from h3scale.model.families import dense_config
from h3scale.model.names import DENSE_FFN, HUB, LAYOUTS, MoeNames, Origin, locate, match

DENSE, UNIVERSAL = "dense", "universal"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    expert: str | None = None,
    config_from: str | Path | None = None,
    base: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Summary:
    """Writes a model as a folder in the layout `to`, in the dtypes that it has unless `dtype` says otherwise; see Options.

    `to="dense"` with `expert` (its name or number) is that expert alone; `to="universal"` is not a model but a training
    checkpoint of DeepSpeed's, of another one, with its optimizer. Raises what `find_model` does, UsageError (2) for a
    layout that the model cannot have, OutputError (73) when `target` is there.
    """
    how = Options(**options)
    if to == UNIVERSAL:
        if how.dtype is not None or expert is not None or base is not None:
            raise UsageError(f"--to {UNIVERSAL}: takes no --dtype, no --expert and no --base: it is what the optimizer had")
        return write_universal(source, target, how, force, config_from)
    check_output(target, force)
    if expert is not None and to != DENSE:
        raise UsageError(f"--expert: '{expert}' with --to {to} (works: --to {DENSE})")
    model = find_model(source, config_from, base)
    plan = plan_dense(model, expert, how) if to == DENSE else plan_layout(model, to, how)
    return write_model_folder(plan, target, how, force, "convert")


def plan_layout(model: SourceModel, to: str, how: Options) -> Plan:
    """The tensors of a layout, in the order of the config, each made of one matrix or of those of many experts."""
    if to not in LAYOUTS or (model.moe is None and to != HUB):
        works = ", ".join(LAYOUTS) if model.moe else f"{HUB}: a dense model has one layout"
        raise UsageError(f"--to: '{to}' (works: {works})")
    held: dict[str, list[tuple[Origin, str]]] = {}
    for name in model.shapes:
        origin = locate(model.moe, to, name) if model.moe else Origin(name)
        held.setdefault(origin.tensor, []).append((origin, name))
    outputs = {}
    for tensor, parts in held.items():
        parts.sort(key=_order)
        place, shape = parts[0][0].place, model.shapes[parts[0][1]]
        pieces = [piece_of(model, name, bool(place and place.transposed)) for _, name in parts]
        if place:
            shape = place.tensor_shape(shape, model.num_experts)
        source = stack([piece.source for piece in pieces], shape) if len(pieces) > 1 else pieces[0].source
        outputs[tensor] = output(tensor, shape, source, pieces, how)
    return Plan(model, outputs, model.config, to)


def plan_dense(model: SourceModel, expert: str | None, how: Options) -> Plan:
    """The tensors of a dense model whose FFNs are those of one expert: what the mixture computes when it takes no other."""
    if model.moe is None:
        return plan_layout(model, HUB, how)
    if expert is None:
        raise UsageError(f"--to {DENSE}: which of the {model.num_experts} experts? (works: --expert {_map(model).names()[0]})")
    number = _map(model).find(expert)
    config = dense_config(full_config(model.config, model.folder).to_dict())
    outputs = {}
    for name, shape in model.shapes.items():
        renamed = _dense_name(model.moe, name, number)
        if renamed is not None:
            piece = piece_of(model, name)
            outputs[renamed] = output(renamed, shape, piece.source, [piece], how)
    found = {name: output.spec.shape for name, output in outputs.items()}
    findings = differences(found, expected_shapes(config, model.folder), f"{model.path} as {config['model_type']}")
    if findings:
        raise DataError(findings)
    return Plan(model, outputs, config, DENSE)


def _dense_name(moe: MoeNames, name: str, expert: int) -> str | None:
    """The name in the dense model, None for routers and other experts."""
    if match(moe.hub_router, name) is not None:
        return None
    for projection, template in moe.hub_experts.items():
        found = match(template, name)
        if found is not None:
            return DENSE_FFN[projection].format(**found) if found["expert"] == expert else None
    return name


def _map(model: SourceModel) -> ExpertMap:
    return ExpertMap.from_config(model.config) or ExpertMap((), (None,) * model.num_experts)


def piece_of(model: SourceModel, name: str, transposed: bool = False) -> Piece:
    """A tensor of the hub layout, as a piece of what is to be written."""
    origin = model.origin(name)
    weights, shares = model.weights, model.weights.shared.get(origin.tensor)
    return Piece(name, weights.stored_name(origin.tensor), origin.expert, model.source(name, transposed), shares)


def _order(part: tuple[Origin, str]) -> tuple[int, int]:
    origin = part[0]
    return (origin.expert or 0, origin.place.part) if origin.place else (0, 0)
