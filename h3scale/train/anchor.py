"""Where the experts started, kept sharded like the parameters, and the drift of their weights from there.

drift = sum over experts e of gamma_e * (1/L) * sum over layers l of |W_le - W0_le|^2 / |W0_le|^2, where W_le are the three
matrices of expert e in layer l together. Being relative, gamma means the same at every size. Under ZeRO-3 a term added
to the loss would have no gradient (the shard is outside autograd), so the gradient is added to the shard's own; nothing
is gathered but L x E numbers at the start. The published H3Fusion code takes the norm of the weights, not of their drift.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.config.recipe import Drift
from h3scale.errors import ConfigError, DataError
from h3scale.model.experts import ExpertMap
from h3scale.model.names import MOE, match


@dataclass
class Shard:
    """This rank's part of one stacked tensor of experts, (E, out, in) over all EP ranks.

    `begin` is where it begins in that tensor when flattened, so a shard is understood without knowing any topology.
    `start` has the values at the start, fp32, without ZeRO's padding at the end of the last shard.
    """

    name: str
    parameter: torch.nn.Parameter
    layer: int
    shape: tuple[int, int, int]
    begin: int
    start: Tensor

    def spans(self) -> Iterator[tuple[int, slice]]:
        """The experts that the shard has values of, each with its span in `start`."""
        _, rows, columns = self.shape
        per_expert = rows * columns
        end = self.begin + len(self.start)
        for expert in range(self.begin // per_expert, -(-end // per_expert)):
            low, high = max(self.begin, expert * per_expert), min(end, (expert + 1) * per_expert)
            yield expert, slice(low - self.begin, high - self.begin)

    def now(self) -> Tensor:
        """The values as they are now, fp32, without padding."""
        return _local(self.parameter)[: len(self.start)]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The start of this EP rank's experts, (local experts, out, in), gathered over their data-parallel ranks.

        A collective over those ranks, which hold the same experts; nothing is sent where there is one.
        """
        place: Any = self.parameter  # ZeRO-3 puts its attributes on the parameter
        part = self.start.new_zeros(place.ds_tensor.numel(), dtype=dtype)
        part[: len(self.start)] = self.start
        flat, group = part, place.ds_process_group
        if dist.get_world_size(group) > 1:
            flat = part.new_empty(dist.get_world_size(group) * len(part))
            dist.all_gather_into_tensor(flat, part, group=group)
        return flat[: place.ds_numel].view(place.ds_shape)


class Anchor:
    """The start of all experts, a shard a rank, and gamma of each expert."""

    def __init__(self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int):
        self.gammas = expert_gammas(recipe, expert_map)
        self.num_layers, self.num_experts = num_layers, expert_map.num_experts
        self.device = engine.device
        self.shards = list(_shards(engine, moe_type, self.num_experts))

    def attach(self, total: Tensor) -> Tensor:
        """The loss of a micro-batch on its way to backward, for a drift that has to know how it is scaled there."""
        return total

    def close_step(self) -> Tensor:
        """This rank's part of the drift of this step, a scalar: the sum over the ranks is the loss. Before engine.step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards with all that it takes to share them out anew, over any number of ranks."""
        return {
            shard.name: {"layer": shard.layer, "shape": shard.shape, "begin": shard.begin, "values": shard.start}
            for shard in self.shards
        }

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Takes the start from the states of all ranks of a run (of those, at least, that had what this rank has).

        Every rank calls this. DataError (65) where a tensor has another shape or the states do not cover this rank's part.
        """
        states = list(states)
        findings = []
        for shard in self.shards:
            found = [state[shard.name] for state in states if shard.name in state]
            if any(tuple(part["shape"]) != shard.shape for part in found):
                findings.append(f"drift anchor: {shard.name} has shape {found[0]['shape']}, the model's is {shard.shape}")
                continue
            covered = fill(shard.start, shard.begin, [(part["begin"], part["values"]) for part in found])
            if covered < len(shard.start):
                missing = shard.begin + covered
                findings.append(f"drift anchor: {shard.name} is not there from value {missing} on (works: the states of all ranks)")
        if findings:
            raise DataError(findings)


class DriftAnchor(Anchor):
    """Drift of the weights: its gradient is added to this rank's shard at the accumulation boundary."""

    def __init__(self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int):
        super().__init__(engine, recipe, expert_map, moe_type, num_layers)
        self.scale_LE = self._scales()

    def close_step(self) -> Tensor:
        value = self.local_sum()
        self.add_gradient()
        return value

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Adds d drift / d W to the gradient of this rank's shard. After backward, before step."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for shard in self.shards:
            gradient = safe_get_local_grad(shard.parameter)
            now = shard.now()
            for expert, span in shard.spans():
                factor = 2 * float(self.scale_LE[shard.layer, expert])
                gradient[span] += factor * (now[span] - shard.start[span])
            safe_set_local_grad(shard.parameter, gradient)

    @torch.no_grad()
    def local_sum(self) -> Tensor:
        """This rank's part of the drift loss, a scalar; each shard is one rank's, so the sum over the ranks is the loss."""
        total = torch.zeros((), dtype=torch.float64)
        for shard in self.shards:
            distance = shard.now() - shard.start
            for expert, span in shard.spans():
                total += float(self.scale_LE[shard.layer, expert]) * distance[span].double().square().sum().cpu()
        return total

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        super().load_state_dict(states)
        self.scale_LE = self._scales()

    def _scales(self) -> Tensor:
        """gamma_e / (L * |W0_le|^2), (L, E) float64, the same on every rank."""
        squares_LE = torch.zeros(self.num_layers, self.num_experts, dtype=torch.float64)
        for shard in self.shards:
            for expert, span in shard.spans():
                squares_LE[shard.layer, expert] += shard.start[span].double().square().sum().cpu()
        squares_LE = squares_LE.to(self.device)
        dist.all_reduce(squares_LE)
        gammas_E = torch.tensor(self.gammas, dtype=torch.float64)
        return gammas_E / (self.num_layers * squares_LE.cpu().clamp_min(torch.finfo(torch.float32).tiny))


def expert_gammas(recipe: Drift, expert_map: ExpertMap) -> list[float]:
    """gamma of each expert; ConfigError (78) for a name in `gammas` that is no alignment of the model."""
    known = [*expert_map.alignments, "general"]
    unknown = [name for name in recipe.gammas if name not in known]
    if unknown:
        raise ConfigError([f"drift.gammas: '{name}' is no alignment of the model (works: {', '.join(known)})" for name in unknown])
    return [recipe.gammas.get(alignment or "general", recipe.gamma) for alignment in expert_map.experts]


def fill(target: Tensor, begin: int, parts: Iterable[tuple[int, Tensor]]) -> int:
    """Copies into `target`, whose first value is number `begin`, what the parts (first number, values) have of it.

    Gives how many values are covered from the front without a gap.
    """
    done, end = begin, begin + len(target)
    for first, values in sorted(parts, key=lambda part: part[0]):
        until = min(end, first + len(values))
        if first <= done < until:
            target[done - begin : until - begin] = values[done - first : until - first]
            done = until
    return done - begin


def _shards(engine: Any, moe_type: str, num_experts: int) -> Iterator[Shard]:
    templates = list(MOE[moe_type].autoep_experts.values())
    for name, parameter in engine.module.named_parameters():
        found = next((numbers for t in templates if (numbers := match(t, name))), None)
        if found is None or not parameter.requires_grad:
            continue
        place: Any = parameter
        num_local_experts, rows, columns = place.ds_shape
        first_expert = engine.module.get_submodule(name.rsplit(".", 2)[0]).ep_rank * num_local_experts
        length = place.ds_tensor.numel()
        begin = length * dist.get_rank(place.ds_process_group)
        shape = (num_experts, rows, columns)
        start = _local(parameter)[: max(0, place.ds_numel - begin)].clone()
        yield Shard(name, parameter, found["layer"], shape, first_expert * rows * columns + begin, start)


def _local(parameter: torch.nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(parameter)
