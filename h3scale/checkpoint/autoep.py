"""Which expert is where: what DeepSpeed's AutoEP says of each of its layers in `ds_autoep_layers` (0.19)."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from h3scale.checkpoint.extents import Stored, joined
from h3scale.errors import DataError

# (format, version) that the layer names, by whether ZeRO-3 partitioned the experts
FORMATS = {True: ("zero3_partitioned", 1), False: ("per_expert_files", None)}


@dataclass(frozen=True)
class ExpertLayer:
    """`placed[r]`: the experts that EP rank r holds, in its order. `prefix`: of their names. `index`: in names of files."""

    prefix: str
    num_experts: int
    ep_size: int
    ep_rank: int
    index: int
    placed: tuple[tuple[int, ...], ...]

    def stacked(self, name: str, shards: dict[int, Stored]) -> Stored:
        """All experts in their order, of what each EP rank holds of them (local experts, ...)."""
        place = {expert: (rank, i) for rank, experts in enumerate(self.placed) for i, expert in enumerate(experts)}
        inner = next(iter(shards.values())).shape[1:]
        for rank, experts in enumerate(self.placed):
            if rank not in shards and experts:
                raise DataError(f"{name}: lacks experts {list(experts)} of EP rank {rank}")
            if rank in shards and shards[rank].shape != (len(experts), *inner):
                raise DataError(f"{name}: EP rank {rank} holds {shards[rank].shape}, its experts are {list(experts)} of {inner}")
        rows = [shards[rank].row(i) for rank, i in (place[expert] for expert in range(self.num_experts))]
        return joined(rows, (self.num_experts, *inner))


def expert_layers(states: dict[str, Any], partitioned: bool, where: object) -> dict[str, ExpertLayer]:
    """The layers by prefix. DataError (65) for another format than DeepSpeed 0.19's, or experts that are not all placed once."""
    layers = {}
    for layer in states.get("ds_autoep_layers") or []:
        prefix = layer["expert_key_prefix"]
        found = layer.get("checkpoint_format"), layer.get("checkpoint_format_version")
        if found != FORMATS[partitioned]:
            raise DataError(f"{where}: {prefix} is stored as {found} (works: {FORMATS[partitioned]}, of deepspeed 0.19)")
        ranks = {rank["rank"]: tuple(rank["experts"]) for rank in layer["expert_placement"]["ranks"]}
        placed = tuple(ranks[rank] for rank in range(layer["ep_size"]))
        if sorted(chain(*placed)) != list(range(layer["num_experts"])):
            raise DataError(f"{where}: {prefix}: experts {sorted(chain(*placed))} are placed, of {layer['num_experts']}")
        index = layer.get("moe_layer_id", 0)
        layers[prefix] = ExpertLayer(prefix, layer["num_experts"], layer["ep_size"], layer["ep_rank"], index, placed)
    return layers
