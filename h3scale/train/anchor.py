"""Where the experts started, kept sharded like the parameters, and the drift of their weights from there.

A run that goes on reads the start again from the model that it began with: no checkpoint has to hold it.

drift = sum over experts e of gamma_e * (1/L) * sum over layers l of |W_le - W0_le|^2 / |W0_le|^2, where W_le are the three
matrices of expert e in layer l together. Being relative, gamma means the same at every size. The master weights are cut over
the ranks (outside autograd under ZeRO-3), so the gradient is added to each shard's own; nothing is gathered but L x E numbers at
the start. The published H3Fusion code takes the norm of the weights, not of their drift.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.config.recipe import Drift
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap
from h3scale.model.names import MOE, match
from h3scale.train.shard import Shard


@dataclass
class Held:
    """This rank's part of one stacked tensor of experts, and the values it had at the start.

    They are kept in 16 bits where that is exact, as it is for models published so, and on the host where the optimizer is.
    """

    shard: Shard
    layer: int
    start: Tensor

    def spans(self) -> Iterator[tuple[int, slice]]:
        """The experts that the part has values of, each with its span in `start`."""
        done = 0
        for expert, low, high in self.shard.experts():
            yield expert, slice(done, done + high - low)
            done += high - low

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The start of this EP rank's experts, (local experts, out, in), gathered over their data-parallel ranks."""
        return self.shard.gather(self.start.to(self.shard.parameter.device, dtype))


class Anchor(ABC):
    """The start of all experts, a shard a rank, and gamma of each expert."""

    def __init__(self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int):
        self.gammas = expert_gammas(recipe, expert_map)
        self.num_layers, self.num_experts = num_layers, expert_map.num_experts
        self.device = engine.device
        self.held = list(_held(engine, moe_type, self.gammas))

    def attach(self, total: Tensor) -> Tensor:
        """The loss of a micro-batch on its way to backward, for a drift that has to know how it is scaled there."""
        return total

    @abstractmethod
    def close_step(self) -> Tensor:
        """This rank's part of the drift of this step, a scalar: the sum over the ranks is the loss. Before engine.step."""


class DriftAnchor(Anchor):
    """Drift of the weights: its gradient is added to this rank's shard at the accumulation boundary."""

    def __init__(self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int):
        super().__init__(engine, recipe, expert_map, moe_type, num_layers)
        self.scale_LE = self._scales()

    @torch.no_grad()
    def close_step(self) -> Tensor:
        """Each shard is one rank's, so the sum over the ranks is the loss. Nothing waits for the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for held in self.held:
            if not len(held.shard):
                continue
            distance = held.shard.values().to(self.device) - held.start.to(self.device)
            for expert, span in held.spans():
                scale = float(self.scale_LE[held.layer, expert])
                total += scale * distance[span].square().sum(dtype=torch.float64)
                distance[span] *= 2 * scale  # d drift / d W
            held.shard.add_gradient(distance)
        return total

    def _scales(self) -> Tensor:
        """gamma_e / (L * |W0_le|^2), (L, E) float64, the same on every rank."""
        squares_LE = torch.zeros(self.num_layers, self.num_experts, dtype=torch.float64)
        for held in self.held:
            for expert, span in held.spans():
                squares_LE[held.layer, expert] += held.start[span].float().square().sum(dtype=torch.float64).cpu()
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


def _held(engine: Any, moe_type: str, gammas: Sequence[float]) -> Iterator[Held]:
    """The parts of this rank in which an expert is held at all."""
    templates = list(MOE[moe_type].autoep_experts.values())
    offloaded = engine.zero_offload_optimizer() is not None
    for name, parameter in engine.module.named_parameters():
        found = next((numbers for t in templates if (numbers := match(t, name))), None)
        if found is None or not parameter.requires_grad:
            continue
        shard = Shard.of(engine.module, name, parameter)
        first = shard.first_expert
        if any(gammas[first : first + shard.shape[0]]):  # of all this EP rank's experts: the ranks that gather agree
            start = shard.values()
            start = start.cpu() if offloaded else start
            yield Held(shard, found["layer"], _smallest(start))


def _smallest(values: Tensor) -> Tensor:
    """A copy of the values in 16 bits where that is exact."""
    for dtype in (torch.bfloat16, torch.float16):
        rounded = values.to(dtype)
        if torch.equal(rounded.float(), values):
            return rounded
    return values.clone()
