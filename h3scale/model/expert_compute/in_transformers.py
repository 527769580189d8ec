"""The backends in transformers' registry of experts, so that its own models compute with them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from h3scale.errors import ConfigError
from h3scale.model.expert_compute.layer import mix
from h3scale.model.expert_compute.registry import Backend, check_fits, choose
from h3scale.model.families import num_experts

SILU = ("silu", "swish")
# Mixtral's and Qwen3-MoE's, in the words of transformers' experts.
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}


def use_experts(model: Any, name: str) -> None:
    """Has the experts of a transformers model computed by the backend `name`; nothing happens to a dense model.

    ConfigError (78) for a backend that cannot be had or does not take such experts, and for experts that are no SwiGLU or lie
    otherwise than Mixtral's (`auto` leaves these to transformers).
    """
    if num_experts(model.config) is None:
        return
    backend = choose(name)
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "is_transposed")]
    unlike = _unlike(model, experts)
    if unlike and name != "auto":
        raise ConfigError(f"experts: {name} computes SwiGLU, and {unlike} (works: auto)")
    if unlike:
        return
    _, twice_inner, hidden = experts[0].gate_up_proj.shape
    check_fits(name, hidden, twice_inner // 2, experts[0].gate_up_proj.dtype)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(f"h3scale_{name}", _forward(backend))
    model.set_experts_implementation(f"h3scale_{name}")


def _unlike(model: Any, experts: Sequence[Any]) -> str | None:
    """What about a model's experts no backend computes, for people; None where they are Mixtral's or Qwen3-MoE's."""
    activation = getattr(model.config, "hidden_act", None)
    if activation not in SILU:
        return f"the model's hidden_act is '{activation}'"
    if not experts:
        return f"{type(model).__name__} has experts that are not in transformers' registry"
    if type(experts[0])._apply_gate.__module__ == type(experts[0]).__module__:  # its own, in the place of the registry's
        return f"{type(experts[0]).__name__} has a gate of its own"
    others = [f"{word}={found}" for word, usual in LAYOUT.items() if (found := getattr(experts[0], word, usual)) != usual]
    return f"{type(experts[0]).__name__} has {', '.join(others)}" if others else None


def _forward(backend: Backend) -> Any:
    def forward(experts: nn.Module, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights: Any = experts
        return mix(backend, hidden_TH, top_k_index, top_k_weights, weights.gate_up_proj, weights.down_proj, None)

    return forward
