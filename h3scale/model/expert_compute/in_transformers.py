"""The backends in transformers' registry of experts, so that its own models compute with them."""

from typing import Any

from torch import Tensor, nn

from h3scale.errors import ConfigError
from h3scale.model.expert_compute.layer import mix
from h3scale.model.expert_compute.registry import Backend, choose
from h3scale.model.families import num_experts

SILU = ("silu", "swish")


def use_experts(model: Any, name: str) -> None:
    """Has the experts of a transformers model computed by the backend `name`; nothing happens to a dense model.

    ConfigError (78) for a backend that cannot be had, and for experts that are no SwiGLU (`auto` leaves these to transformers).
    """
    if num_experts(model.config) is None:
        return
    backend = choose(name)
    activation = model.config.hidden_act
    if activation not in SILU:
        if name != "auto":
            raise ConfigError(f"experts: {name} computes SwiGLU, and the model's hidden_act is '{activation}' (works: auto)")
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(f"h3scale_{name}", _forward(backend))
    model.set_experts_implementation(f"h3scale_{name}")


def _forward(backend: Backend) -> Any:
    def forward(experts: nn.Module, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights: Any = experts
        return mix(backend, hidden_TH, top_k_index, top_k_weights, weights.gate_up_proj, weights.down_proj, None)

    return forward
