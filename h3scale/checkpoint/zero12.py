"""DeepSpeed ZeRO-1 and ZeRO-2 tag folders, dense or with experts spread by AutoEP (DeepSpeed 0.19.8).

- Rank R writes `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`. In it `single_partition_of_fp32_groups[g]` is its part of
  the flattened parameter group g, and `param_slice_mappings[g][name]` says where in that part its piece of a tensor is.
  The pieces of a tensor by rank, one after another, are the tensor. Groups of experts are divided over the ranks with the
  same experts (EDP), the others over all.
- Rank 0 writes `mp_rank_00_model_states.pt`: `module` has all but the experts in the dtype of training, frozen ones and
  buffers too; `param_shapes[g]` names what is trained, experts with the number that one rank has.
- The first rank that has expert E of layer L writes `layer_L_expert_E_mp_rank_00_model_states.pt`, again in the dtype of
  training; only frozen experts are read from there.
"""

from math import prod
from typing import Any

from h3scale.checkpoint.autoep import ExpertLayer, expert_layers
from h3scale.checkpoint.extents import Stored, Weights, joined
from h3scale.checkpoint.tag_folder import TagFolder, check_steps, check_world
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.checkpoint.zero import is_rounded, moments
from h3scale.errors import DataError, MissingInputError

PROJECTIONS = ("w1", "w2", "w3")  # of an AutoEP layer's experts


def read_zero12(files: TagFolder, moment: str | None = None) -> Weights:
    """A ZeRO-1 or ZeRO-2 tag folder."""
    assert files.whole
    model = TorchFile(files.whole)
    if not files.optim:
        raise MissingInputError(f"{files.path}: no zero_pp_rank_*_optim_states.pt (works: checkpoints of ZeRO-1, 2 or 3)")
    optims = [TorchFile(path) for path in files.by_rank("optim")[0]]
    check_world([model], files.path, len(optims))
    check_steps(optims)
    layers = expert_layers(model.states, False, model.path)
    aliases = dict(model.states.get("shared_params") or {}) | router_aliases(model.states)
    ep_size = max((layer.ep_size for layer in layers.values()), default=1)
    entries = _trained(model, optims, layers, ep_size, moment)
    if not moment:
        for name, values in model.get("module").items():
            if name not in entries and name not in aliases:
                entries[name] = model.stored(values)  # frozen, or a buffer
        entries |= _frozen_experts(files, layers, entries)
    stage = int(optims[0].get("optimizer_state_dict").get("zero_stage", 1))  # the optimizer of bf16 with fp32 sums does not say
    return Weights(
        folder=files.path,
        kind=f"DeepSpeed ZeRO-{stage}" + (" with AutoEP" if layers else ""),
        world_size=len(optims),
        ep_size=ep_size,
        is_rounded=is_rounded(optims[0].states),
        entries=entries,
        aliases=aliases,
        step=model.states.get("global_steps"),
    )


def router_aliases(states: dict[str, Any]) -> dict[str, str]:
    """AutoEP keeps a layer's router under a second name as well, which `shared_params` does not tell."""
    paths = [layer["module_path"] for layer in states.get("ds_autoep_layers") or [] if "module_path" in layer]
    return {f"{path}.gate.gate.weight": f"{path}.router.gate.weight" for path in paths}


def _trained(
    model: TorchFile, optims: list[TorchFile], layers: dict[str, ExpertLayer], ep_size: int, moment: str | None
) -> dict[str, Stored]:
    data_first = (optims[0].states.get("ds_config") or {}).get("use_data_before_expert_parallelism", False)
    edp_size = len(optims) // ep_size
    shapes = model.get("param_shapes")
    pieces: dict[str, dict[int, list[Stored]]] = {}  # by name, then by EP rank
    for rank, optim in enumerate(optims):
        ep_rank = rank // edp_size if data_first else rank % ep_size
        for name, piece in _pieces(optim, len(shapes), moment):
            place = ep_rank if name.rpartition(".")[0] in layers else 0
            pieces.setdefault(name, {}).setdefault(place, []).append(piece)
    entries = {}
    for name, shape in ((name, tuple(shape)) for group in shapes for name, shape in group.items()):
        layer = layers.get(name.rpartition(".")[0])
        shards = {
            place: _whole(found, (len(layer.placed[place]), *shape[1:]) if layer else shape, f"{model.path.parent}: {name}")
            for place, found in pieces.pop(name, {0: []}).items()
        }
        entries[name] = layer.stacked(f"{model.path.parent}: {name}", shards) if layer else shards[0]
    if pieces:
        raise DataError([f"{model.path}: does not name '{name}', which the optimizer states have" for name in pieces])
    return entries


def _pieces(optim: TorchFile, num_groups: int, moment: str | None) -> list[tuple[str, Stored]]:
    groups = optim.get("optimizer_state_dict", "single_partition_of_fp32_groups")
    if moment:
        groups = moments(optim, optim.get("optimizer_state_dict", "base_optimizer_state"), moment, len(groups))
    mappings = optim.get("optimizer_state_dict", "param_slice_mappings")
    if not len(groups) == len(mappings) == num_groups:
        raise DataError(f"{optim.path}: {len(groups)} groups of values for {num_groups} groups of names")
    found = []
    for values, mapping in zip(groups, mappings, strict=True):
        group = optim.stored(values)
        for name, address in mapping.items():
            if not 0 <= address.start <= address.start + address.numel <= group.numel:
                raise DataError(f"{optim.path}: {name} is said to be outside of its group of {group.numel} values")
            found.append((name, group.flat(address.start, address.start + address.numel)))
    return found


def _whole(pieces: list[Stored], shape: tuple[int, ...], what: str) -> Stored:
    found = sum(piece.numel for piece in pieces)
    if found != prod(shape) or not pieces:
        raise DataError(f"{what}: the ranks hold {found} values of {prod(shape)}")
    return joined(pieces, shape)


def _frozen_experts(files: TagFolder, layers: dict[str, ExpertLayer], trained: dict[str, Stored]) -> dict[str, Stored]:
    entries = {}
    for layer in layers.values():
        names = [f"{layer.prefix}.{projection}" for projection in PROJECTIONS]
        names = [name for name in names if name not in trained]
        wanted = [(layer.index, expert) for expert in range(layer.num_experts) if names]
        lost = [key for key in wanted if key not in files.experts]
        if lost:
            raise MissingInputError([f"{files.path}: the states of layer {key[0]}, expert {key[1]} are missing" for key in lost])
        opened = [TorchFile(files.experts[key]) for key in wanted]
        for name in names:
            rows = [file.stored(file.get(f"{name}.{expert}")) for expert, file in enumerate(opened)]
            entries[name] = joined(rows, (layer.num_experts, *rows[0].shape))
    return entries
