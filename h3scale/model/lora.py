"""Low-rank updates of frozen matrices (LoRA, arXiv 2106.09685), by peft: put into a model, and merged out of its tensors.

The model stays what it is, with peft's layers inside: a matrix `x.weight` becomes `x.base_layer.weight` beside
`x.lora_A.default.weight` (rank, in) and `x.lora_B.default.weight` (out, rank); together they are W + alpha / rank * B A.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from h3scale.config.recipe import Lora
from h3scale.errors import ConfigError
from h3scale.model.trainable import group_of

# Of transformers' Llama, Mistral, Qwen3 and their mixtures; a mixture's experts are no such modules.
MODULES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "ffn": ("gate_proj", "up_proj", "down_proj")}
BASE = ".base_layer."


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Puts the updates into a model, zero at first. ConfigError (78) for targets that the model does not have."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    absent = [target for target in lora.targets if not linear & set(MODULES[target])]
    if absent:
        works = ", ".join(target for target, names in MODULES.items() if linear & set(names))
        raise ConfigError(
            [f"lora.targets: '{target}': the model has no such matrices, experts are stacked (works: {works})" for target in absent]
        )
    names = [name for target in lora.targets for name in MODULES[target]]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(config, model)


def plain_name(name: str) -> str:
    """The name of a parameter in a model without updates; of an update, its own."""
    return name.replace(BASE, ".")


def is_update(name: str) -> bool:
    """Whether a parameter is part of an update."""
    return group_of(name) == "lora"


def updates_of(name: str) -> tuple[str, str]:
    """The names of A and B for the plain name of a matrix."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def merged(name: str, values: Tensor, scale: float, tensor: Callable[[str], Tensor]) -> Tensor:
    """W + scale * B A in fp32 for the plain name of a matrix; `tensor` gives A and B. `scale` is alpha / rank."""
    low_rank, back = (tensor(update).to(torch.float32) for update in updates_of(name))
    return values.to(torch.float32) + scale * (back @ low_rank)
