"""Training checkpoints with LoRA updates, read as if the updates had been merged into their matrices all along."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from h3scale.checkpoint.extents import Computed, Stored, Weights
from h3scale.checkpoint.shard_files import TensorSpec
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.errors import DataError
from h3scale.model.lora import BASE, is_update, merged, plain_name, updates_of


@dataclass
class MergedWeights(Weights):
    """A checkpoint whose tensors have the names and values of a model without updates.

    `scale` is alpha / rank. Merged matrices are fp32: the frozen ones were kept in the dtype of training.
    """

    scale: float = 0.0

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        found = {}
        for name, entry in self.entries.items():
            if not is_update(name):
                plain = plain_name(name)
                found[plain] = TensorSpec(plain, entry.shape, torch.float32 if plain != name else entry.dtype)
        return found

    def source(self, name: str, expert: int | None = None) -> Stored | Computed:
        base = self.entries.get(f"{name.removesuffix('.weight')}{BASE}weight")
        if base is None:
            return super().source(name, expert)
        low_rank, back = (cast(Stored, super(MergedWeights, self).source(update)) for update in updates_of(name))
        inputs = {"weight": base, "lora_A": low_rank, "lora_B": back}

        def rows(start: int, stop: int) -> torch.Tensor:
            parts = dict(zip(updates_of(name), (low_rank.values(), back.rows(start, stop).values()), strict=True))
            return merged(name, base.rows(start, stop).values(), self.scale, parts.__getitem__)

        return Computed(base.shape, torch.float32, inputs, rows)


def open_weights(deepspeed: Path, model: Path) -> Weights:
    """The tensors of a checkpoint; LoRA updates, where there are any, are merged by the scale of `model`/recipe.json.

    Raises DataError (65) when there are updates and no recipe that says how much they count.
    """
    weights = open_deepspeed(deepspeed)
    if not any(is_update(name) for name in weights.entries):
        return weights
    lora = read_json(model / "recipe.json").get("lora") if (model / "recipe.json").is_file() else None
    if not lora:
        raise DataError(f"{deepspeed}: holds LoRA updates, and no {model / 'recipe.json'} with `lora` says how much they count")
    known = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return MergedWeights(**known, scale=lora["alpha"] / lora["rank"])
