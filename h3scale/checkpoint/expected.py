"""Which tensors a model must have, by its config alone, and what is wrong where it has others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from h3scale.errors import DataError
from h3scale.model import names
from h3scale.model.families import num_experts

_MEGABLOCKS = ".experts.mlp."  # of its modules, whatever they are a part of
_LISTED = 20  # findings of one kind that are written out; the rest is counted


def expected_shapes(config: dict[str, Any], where: str | Path) -> dict[str, tuple[int, ...]]:
    """Names (hub layout) and shapes of all tensors that a model of this config.json has on disk; tied ones once.

    transformers builds the model without values; a mixture of experts is spelled by model/names.py.
    """
    settings = full_config(config, where)
    model = _empty_model(settings, where)
    tied = set(model.all_tied_weights_keys) if settings.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    moe = names.MOE.get(settings.model_type)
    if moe is None:
        return shapes
    count = num_experts(settings) or 0
    return {hub: of for name, shape in shapes.items() for hub, of in names.hub_shapes(moe, "fused", name, shape, count).items()}


def full_config(config: dict[str, Any], where: str | Path) -> Any:
    """transformers' config object of a config.json, with the defaults of its family. DataError (65) where it knows none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})
    except (KeyError, ValueError, TypeError) as error:
        raise _unbuildable(where, error) from error


def _empty_model(settings: Any, where: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (KeyError, ValueError, TypeError) as error:
        raise _unbuildable(where, error) from error


def _unbuildable(where: str | Path, error: Exception) -> DataError:
    return DataError(f"{where}: transformers cannot build a model from this config.json ({error})")


def stored_as(name: str, moe_type: str | None) -> tuple[str, int | None]:
    """Where a hub tensor is in a training checkpoint: the stored name, and which of its stacked experts."""
    moe = names.MOE.get(moe_type or "")
    if moe is None:
        return name, None
    origin = names.locate(moe, names.AUTOEP, name)
    return origin.tensor, origin.expert


def differences(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str | Path, model_type: str = ""
) -> list[str]:
    """A finding for each tensor that is missing, unknown or of another shape; one for all where the experts of a `model_type`
    are MegaBlocks' and no config of transformers knows them, as in llm-foundry's MPT."""
    foreign = [name for name in found if _MEGABLOCKS in name]
    if model_type and foreign and not any(_MEGABLOCKS in name for name in expected):
        return [
            f"{where}: {foreign[0]} and {len(foreign) - 1} more are MegaBlocks' experts, which model_type '{model_type}' does not "
            f"have in transformers (works: {', '.join(names.MOE)}, with dMoE layers in the place of their own)"
        ]
    shared = found.keys() & expected.keys()
    other = [name for name in expected if name in shared and found[name] != expected[name]]
    return [
        *_listing([name for name in expected if name not in shared], lambda name: f"{where}: {name} {expected[name]} is missing"),
        *_listing(
            [name for name in found if name not in shared], lambda name: f"{where}: {name} {found[name]} is in no such model"
        ),
        *_listing(other, lambda name: f"{where}: {name} is {found[name]}, config.json asks for {expected[name]}"),
    ]


def _listing(items: list[str], say: Callable[[str], str]) -> list[str]:
    rest = len(items) - _LISTED
    return [say(item) for item in items[:_LISTED]] + ([f"... and {rest} more like this"] if rest > 0 else [])
