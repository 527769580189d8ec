"""The backends of model.expert_compute in DeepSpeed's AutoEP, which has no registry: its experts get another forward."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.errors import ConfigError
from h3scale.model.expert_compute import check_fits, choose
from h3scale.model.families import MOE_FAMILIES

MATRICES = ("w1", "w2", "w3")
ARGUMENTS = ["self", "x", "num_tokens_per_expert"]


def check_backend(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """ConfigError (78) for a backend that cannot be had here, or would refuse the experts of a config.json computed in `dtype`."""
    choose(name)
    hidden, inner = config.get("hidden_size"), config.get(MOE_FAMILIES[config["model_type"]].expert_size_key)
    if hidden and inner:  # else the family's defaults, which transformers knows
        check_fits(name, hidden, inner, dtype)


def use_experts(model: nn.Module, name: str) -> None:
    """Has all experts that AutoEP made of `model` computed by the backend `name`.

    Call it after deepspeed.initialize. ConfigError (78) when the backend cannot be had, or DeepSpeed's experts are not as this
    needs them.
    """
    from deepspeed.moe.ep_experts import GroupedExperts

    made = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    if not made:
        return
    backend = choose(name)
    check_experts(made[0])
    chosen = _chosen(GroupedExperts)
    for experts in made:
        experts.compute = backend
        experts.__class__ = chosen


def check_experts(experts: Any) -> None:
    """ConfigError (78) unless forward takes rows and counts, and w1, w2, w3 of a SwiGLU are all there is."""
    arguments = list(inspect.signature(type(experts).forward).parameters)
    matrices = sorted(name for name, _ in experts.named_parameters())
    activation = getattr(experts, "activation", None)
    if arguments != ARGUMENTS or matrices != list(MATRICES) or activation != "swiglu":
        raise ConfigError(
            f"experts need forward({', '.join(ARGUMENTS)}), weights {', '.join(MATRICES)} and swiglu as in DeepSpeed 0.19.8, and "
            f"here they are {type(experts).__name__}.forward({', '.join(arguments)}) with {', '.join(matrices)} and {activation} "
            "(works: deepspeed==0.19.8)"
        )


def _chosen(plain: type[Any]) -> type[Any]:
    class ChosenExperts(plain):
        """DeepSpeed's experts, their parameters and all that DeepSpeed knows of them, with a forward from the registry."""

        def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
            return self.compute(x, num_tokens_per_expert, self.w1, self.w2, self.w3)

    return ChosenExperts
