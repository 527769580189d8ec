"""The drift loss: how far each expert has gone from where it started, and its gradient on this rank's own shard.

drift = sum over experts e of gamma_e * (1/L) * sum over layers l of |W_le - W0_le|^2 / |W0_le|^2, where W_le are the three
matrices of expert e in layer l together. Being relative, gamma means the same at every size. Under ZeRO-3 a term added
to the loss would have no gradient (the shard is outside autograd), so the gradient is added to the shard's own; nothing
is gathered but L x E numbers at the start. The published H3Fusion code takes the norm of the weights, not of their drift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.config.recipe import Drift
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap
from h3scale.model.names import MOE, match


@dataclass(frozen=True)
class _Piece:
    """This rank's part of one expert's matrix: `span` in the flat shard, and whose it is."""

    parameter: torch.nn.Parameter
    span: slice
    layer: int
    expert: int


class DriftAnchor:
    """Remembers this rank's shard of the experts and adds the drift's gradient at the accumulation boundary."""

    def __init__(self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int):
        gammas = expert_gammas(recipe, expert_map)
        self.active = any(gammas)
        self.num_experts = expert_map.num_experts
        self.pieces = list(_pieces(engine, moe_type)) if self.active else []
        self.start = {p: _shard(p).clone() for p in {id(x.parameter): x.parameter for x in self.pieces}.values()}
        self.num_layers = num_layers
        self.gammas = gammas
        self.scale_LE = self._scales(engine) if self.active else torch.zeros(0)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Adds d drift / d W to the gradient of this rank's shard. After backward, before step."""
        for parameter, start in self.start.items():
            gradient = _gradient(parameter)
            distance = _shard(parameter) - start
            for piece in self.pieces:
                if piece.parameter is parameter:
                    factor = 2 * float(self.scale_LE[piece.layer, piece.expert])
                    gradient[piece.span] += factor * distance[piece.span]
            _set_gradient(parameter, gradient)

    @torch.no_grad()
    def local_sum(self) -> Tensor:
        """This rank's part of the drift loss, a scalar; each shard is one rank's, so the sum over the ranks is the loss."""
        total = torch.zeros((), dtype=torch.float64)
        for piece in self.pieces:
            distance = _shard(piece.parameter)[piece.span] - self.start[piece.parameter][piece.span]
            total += float(self.scale_LE[piece.layer, piece.expert]) * distance.double().square().sum().cpu()
        return total

    def _scales(self, engine: Any) -> Tensor:
        """gamma_e / (L * |W0_le|^2), (L, E) float64, the same on every rank."""
        squares_LE = torch.zeros(self.num_layers, self.num_experts, dtype=torch.float64)
        for piece in self.pieces:
            squares_LE[piece.layer, piece.expert] += self.start[piece.parameter][piece.span].double().square().sum().cpu()
        squares_LE = squares_LE.to(engine.device)
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


def _pieces(engine: Any, moe_type: str) -> Iterator[_Piece]:
    templates = list(MOE[moe_type].autoep_experts.values())
    for name, parameter in engine.module.named_parameters():
        found = next((numbers for t in templates if (numbers := match(t, name))), None)
        if found is None or not parameter.requires_grad:
            continue
        num_local_experts, rows, columns = parameter.ds_shape
        per_expert = rows * columns
        first_expert = engine.module.get_submodule(name.rsplit(".", 2)[0]).ep_rank * num_local_experts
        begin, length = _place(parameter)
        for local in range(num_local_experts):
            low = max(begin, local * per_expert) - begin
            high = min(begin + length, (local + 1) * per_expert) - begin
            if low < high:
                yield _Piece(parameter, slice(low, high), found["layer"], first_expert + local)


def _place(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Where this rank's shard begins in the flattened parameter, and its length (its padding included)."""
    shard: Any = parameter  # ZeRO-3 puts its attributes on the parameter
    length = shard.ds_tensor.numel()
    return length * dist.get_rank(shard.ds_process_group), length


def _shard(parameter: torch.nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(parameter)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_local_grad

    return safe_get_local_grad(parameter)


def _set_gradient(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
    from deepspeed.utils import safe_set_local_grad

    safe_set_local_grad(parameter, gradient)
