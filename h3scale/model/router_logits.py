"""The router's logits of a transformers mixture, without the balancing loss that transformers makes with them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from h3scale.errors import ConfigError


def with_router_logits(call: Callable[..., Any], model: Any, **inputs: Any) -> Any:
    """What `call(**inputs)` gives, with `router_logits`: of every layer, (T, E) each.

    `call` is the causal `model` or an engine around it. Asked for them itself, that model makes its balancing loss as well, eight
    operations a layer and on a GPU two waits a layer for counts; so the model within it is asked, for this one call. ConfigError
    (78) where a transformers gives none then.
    """
    hook = model.base_model.register_forward_pre_hook(_ask, with_kwargs=True)
    try:
        output = call(**inputs, output_router_logits=False)
    finally:
        hook.remove()
    if output.router_logits is None:
        raise ConfigError(
            f"{type(model).__name__} does not give the router logits of the model within it, as it does in transformers 5.17 "
            "to 5.22 (works: transformers==5.22.2)"
        )
    return output


def _ask(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, named | {"output_router_logits": True}
