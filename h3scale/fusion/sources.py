"""Where experts come from: a dense model folder or a PEFT LoRA adapter, read the same way, one tensor at a time.

Where we differ from the official H3Fusion code (read, and run):
- its three experts are one and the same tensor, to which every adapter is added in place; here every call of
  `tensor` gives a tensor of its own;
- it adds B A without alpha / r, twice the trained change at its own settings; here the scale is PEFT's;
- it trains adapters on Llama-2 and adds them to Llama-2-chat; here the base is the recipe's, and an adapter that
  names another one is pointed out.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from h3scale.checkpoint.shards import ModelFolder, TensorSpec, read_json
from h3scale.config.fuse import FuseRecipe
from h3scale.errors import DataError, H3Error, MissingInputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Settings of PEFT that change what an adapter means; it is refused unless they have one of these values.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also change the base's weights, which the adapter's files do not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class Source(Protocol):
    """A model as fusion sees it. `label` is its alignment, or "base"; `kind` is "model" or "adapter"."""

    @property
    def label(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def specs(self) -> dict[str, TensorSpec]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The values in the base's dtype, a new tensor at every call."""

    def changed(self, names: list[str]) -> list[str]:
        """Which of these tensors are not the base's."""


@dataclass(frozen=True)
class DenseSource:
    """A dense model folder. `base` is None for the base itself."""

    label: str
    folder: ModelFolder
    base: ModelFolder | None = None
    kind: str = "model"

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.folder.specs

    def tensor(self, name: str) -> torch.Tensor:
        values = self.folder.tensor(name)
        return values if self.base is None else values.to(self.base.specs[name].dtype)

    def changed(self, names: list[str]) -> list[str]:
        if self.base is None:
            return []
        return [name for name in names if not torch.equal(self.tensor(name), self.base.tensor(name))]


class AdapterSource:
    """A PEFT LoRA adapter of the base: W = W_0 + scale B A in fp32, then the base's dtype.

    scale is alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA; `alpha_pattern` and `rank_pattern` are honoured.
    Raises MissingInputError (66) without weights, DataError (65) with every setting that is not plain LoRA.
    """

    kind = "adapter"

    def __init__(self, label: str, path: Path, base: ModelFolder):
        self.label, self.path, self.base = label, path, base
        self.config = read_json(path / ADAPTER_CONFIG)
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise MissingInputError(f"{path}: no {ADAPTER_WEIGHTS} (only safetensors are read)")
        findings = [
            f"{path / ADAPTER_CONFIG}: {key}: {self.config[key]!r} (works: {' or '.join(map(repr, allowed))})"
            for key, allowed in _MUST_BE.items()
            if self.config.get(key, allowed[0]) not in allowed
        ]
        if findings:
            raise DataError(findings)
        self._check_pairs()

    @cached_property
    def _pairs(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of every tensor that the adapter changes, {"A": (r, in), "B": (out, r)}."""
        try:
            tensors = load_file(self.path / ADAPTER_WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.path / ADAPTER_WEIGHTS}: not a readable safetensors file ({error})") from error
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        foreign = []
        for key, values in tensors.items():
            found = _KEY.fullmatch(key)
            if found is None:
                foreign.append(key)
            else:
                pairs.setdefault(f"{found['module']}.weight", {})[found["part"]] = values
        if foreign:
            shown = ", ".join(sorted(foreign)[:3])
            raise DataError(f"{self.path}: {len(foreign)} tensors are not LoRA of a linear layer (such as {shown})")
        return pairs

    def _check_pairs(self) -> None:
        findings = []
        for name, pair in self._pairs.items():
            if set(pair) != {"A", "B"}:
                findings.append(f"{self.path}: {name}: only lora_{next(iter(pair))} is there, a pair is needed")
            elif name not in self.base.specs:
                findings.append(f"{self.path}: changes {name}, which the base {self.base.path} does not have")
            else:
                shape = (pair["B"].shape[0], pair["A"].shape[1])
                if shape != self.base.specs[name].shape or pair["A"].shape[0] != pair["B"].shape[1]:
                    parts = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
                    findings.append(f"{self.path}: {name}: {parts} do not fit the base's {self.base.specs[name].shape}")
        if not self._pairs:
            findings.append(f"{self.path}: the adapter changes no tensor")
        if findings:
            raise DataError(findings)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.base.specs

    def scale(self, name: str) -> float:
        """What B A is multiplied by for this tensor."""
        module = name.removesuffix(".weight")
        patterns = self.config.get("alpha_pattern") or {}
        own = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.config["lora_alpha"] if own is None else own
        rank = self._pairs[name]["A"].shape[0]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def tensor(self, name: str) -> torch.Tensor:
        values = self.base.tensor(name)
        pair = self._pairs.get(name)
        if pair is None:
            return values
        delta = pair["B"].float() @ pair["A"].float() * self.scale(name)
        return (values.float() + delta).to(values.dtype)

    def changed(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self._pairs]

    def other_base(self) -> str | None:
        """The base that the adapter names, when that is not the recipe's."""
        named = self.config.get("base_model_name_or_path") or ""
        same = not named or Path(named).resolve() == self.base.path.resolve()
        return None if same or Path(named).name == self.base.path.name else named


def open_sources(recipe: FuseRecipe) -> tuple[DenseSource, dict[str, Source]]:
    """The base and the aligned models, in the recipe's order. All findings of one kind are raised together."""
    folder = ModelFolder(recipe.base)
    _ = folder.specs  # missing weights are noticed now
    models: dict[str, Source] = {}
    errors: list[H3Error] = []
    for label, path in recipe.models.items():
        try:
            models[label] = _open(label, Path(path), folder)
        except H3Error as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([finding for error in errors for finding in error.findings])
    return DenseSource("base", folder), models


def _open(label: str, path: Path, base: ModelFolder) -> Source:
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterSource(label, path, base)
    source = DenseSource(label, ModelFolder(path), base)
    _ = source.specs
    return source
