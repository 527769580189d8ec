"""Training checkpoints with LoRA updates, read as if the updates had been merged into their matrices all along."""

from functools import cached_property
from pathlib import Path

import torch

from h3scale.checkpoint.shards import TensorSpec, read_json
from h3scale.checkpoint.zero import ZeroCheckpoint
from h3scale.errors import DataError
from h3scale.model.lora import BASE, is_update, merged, plain_name


class MergedCheckpoint(ZeroCheckpoint):
    """A ZeRO-3 checkpoint whose tensors have the names and values of a model without updates.

    `scale` is alpha / rank. Merged matrices are fp32: the frozen ones were kept in the dtype of training.
    """

    def __init__(self, folder: Path, scale: float):
        super().__init__(folder)
        self.scale = scale

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        found = {}
        for name, entry in self.entries.items():
            if not is_update(name):
                plain = plain_name(name)
                found[plain] = TensorSpec(plain, entry.shape, torch.float32 if plain != name else entry.dtype)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        wrapped = f"{module}{BASE}weight"
        if wrapped not in self.entries:
            return super().tensor(name)
        return merged(name, super().tensor(wrapped), self.scale, super().tensor)


def open_weights(deepspeed: Path, model: Path) -> ZeroCheckpoint:
    """The tensors of a checkpoint; LoRA updates, where there are any, are merged by the scale of `model`/recipe.json.

    Raises DataError (65) when there are updates and no recipe that says how much they count.
    """
    weights = ZeroCheckpoint(deepspeed)
    if not any(is_update(name) for name in weights.entries):
        return weights
    lora = read_json(model / "recipe.json").get("lora") if (model / "recipe.json").is_file() else None
    if not lora:
        raise DataError(f"{deepspeed}: holds LoRA updates, and no {model / 'recipe.json'} with `lora` says how much they count")
    return MergedCheckpoint(deepspeed, lora["alpha"] / lora["rank"])
