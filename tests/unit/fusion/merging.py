"""Models and adapters to merge, and what a method gives on whole tensors in memory."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from h3scale.checkpoint.shards import ModelFolder, write_json
from h3scale.config.merge import OPTIONS, load_merge
from h3scale.fusion.merge import How, merge
from h3scale.merge.delta import Site, dense
from h3scale.merge.registry import merged_delta
from h3scale.model.names import EMBEDDINGS

LABELS = ("helpful", "harmless", "honest")
RANK = 2
TARGETS = ("self_attn.q_proj", "mlp.down_proj")


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA adapter as PEFT writes it, on two projections of every layer; alpha / r is 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in ModelFolder(base).specs.items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, spec.shape[1], generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(spec.shape[0], RANK, generator=generator)
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"})
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def run(place: Path, out: Path, method: str, models: list[str], how: How | None = None, **values: Any) -> Path:
    base = values.pop("base", "base")
    given = {"models": [str(place / name) for name in models], "method": method, "out": str(out), **values}
    given |= {"base": str(place / base)} if base else {}
    merge(*load_merge(None, given, []), how=how or How(workers=2, fsync=False))
    return out


def models_for(method: str, prefix: str = "") -> list[str]:
    return [f"{prefix}{label}" for label in LABELS[: 2 if method == "slerp" else 3]]


def whole(place: Path, method: str, models: list[str], **values: Any) -> dict[str, torch.Tensor]:
    """Every tensor merged by itself, in memory, from all that is in the files."""
    base, options = load_file(place / "base" / "model.safetensors"), OPTIONS[method](**values)
    parents = [load_file(place / model / "model.safetensors") for model in models]
    return {
        name: values
        + dense(
            merged_delta(
                method,
                values,
                [parent[name] - values for parent in parents],
                options,
                Site(name, tuple(models)),
                is_embedding=name in EMBEDDINGS,
            )
        )
        for name, values in base.items()
    }


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
