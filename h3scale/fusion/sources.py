"""Where experts come from: a dense model folder or a PEFT LoRA adapter, read the same way, one tensor at a time.

Where we differ from the official H3Fusion code (read, and run):
- its three experts are one and the same tensor, to which every adapter is added in place; here every call of
  `tensor` gives a tensor of its own;
- it adds B A without alpha / r, twice the trained change at its own settings; here the scale is PEFT's;
- it trains adapters on Llama-2 and adds them to Llama-2-chat; here the base is the recipe's, and an adapter that
  names another one is pointed out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from h3scale.checkpoint.adapter import ADAPTER_CONFIG, Adapter
from h3scale.checkpoint.shards import ModelFolder, TensorSpec
from h3scale.errors import DataError, H3Error, UnsafeError


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
    """A PEFT LoRA adapter of the base (checkpoint/adapter.py), in the base's dtype.

    Raises MissingInputError (66) without weights, DataError (65) with every setting that is not plain LoRA.
    """

    kind = "adapter"

    def __init__(self, label: str, path: Path, base: ModelFolder):
        self.label, self.path, self.base = label, path, base
        self.adapter = Adapter(path)
        self.adapter.check({name: spec.shape for name, spec in base.specs.items()}, base.path)
        if self.adapter.embeddings:
            raise DataError(
                f"{path}: has embeddings of its own, and experts share the base's (works: h3scale checkpoint convert first)"
            )

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.base.specs

    def tensor(self, name: str) -> torch.Tensor:
        values = self.base.tensor(name)
        if name not in self.adapter.pairs:
            return values
        low_rank, back = (self.adapter.pairs[name][part].values().float() for part in "AB")
        return (values.float() + back @ low_rank * self.adapter.scale(name)).to(values.dtype)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """scale B (out, r) and A (r, in) of a tensor that it changes, in fp32, read now."""
        low_rank_RI, back_OR = (self.adapter.pairs[name][part].values().float() for part in "AB")
        return back_OR * self.adapter.scale(name), low_rank_RI

    def changed(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapter.pairs]

    def other_base(self) -> str | None:
        """The base that the adapter names, when that is not the recipe's."""
        named = self.adapter.config.get("base_model_name_or_path") or ""
        same = not named or Path(named).resolve() == self.base.path.resolve()
        return None if same or Path(named).name == self.base.path.name else named


def open_sources(base: str, paths: Mapping[str, str]) -> tuple[DenseSource, dict[str, Source]]:
    """The base and the aligned models, in the recipe's order. All findings of one kind are raised together."""
    folder = ModelFolder(base)
    _ = folder.specs  # missing weights are noticed now
    models: dict[str, Source] = {}
    errors: list[H3Error] = []
    for label, path in paths.items():
        try:
            models[label] = _open(label, Path(path), folder)
        except H3Error as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([finding for error in errors for finding in error.findings])
    return DenseSource("base", folder), models


def keep_inputs(inputs: Mapping[str, str], out: Path) -> None:
    """UnsafeError (77) when writing `out` would take a folder away that is read; keys say what each is for."""
    findings = [
        f"out: {out} would replace {key}: {path} (choose another out)"
        for key, path in inputs.items()
        if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)
    ]
    if findings:
        raise UnsafeError(findings)


def _open(label: str, path: Path, base: ModelFolder) -> Source:
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterSource(label, path, base)
    source = DenseSource(label, ModelFolder(path), base)
    _ = source.specs
    return source
