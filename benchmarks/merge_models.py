"""Made-up parents of a merge: a base in bf16, models that differ from it everywhere, and LoRA adapters of it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from h3scale.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from h3scale.checkpoint.shard_files import WEIGHTS

NUM_MODELS = 3
TINY = "tiny"
# hidden, intermediate, layers, vocabulary
SIZES = {
    TINY: (64, 176, 2, 512),
    "0.04 B": (512, 1792, 8, 8192),
    "0.06 B": (768, 2688, 6, 8192),
    "0.17 B": (1024, 3584, 8, 25600),
}
RANK = 8
DELTA = 0.002  # beside weights of 0.02: what fine-tuning changes


def write_models(folder: Path, size: str, adapters: bool = False) -> int:
    """base and model-0, ... (or adapter-0, ...) in `folder`; gives the base's number of parameters."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    shapes = _shapes(hidden, intermediate, layers, vocabulary)
    generator = torch.Generator().manual_seed(0)
    base = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    _write(folder / "base", base, config)
    for model in range(NUM_MODELS):
        if adapters:
            _write_adapter(folder / f"adapter-{model}", shapes, generator)
        else:
            _write(folder / f"model-{model}", {name: _changed(values, generator) for name, values in base.items()}, config)
    return sum(values.numel() for values in base.values())


def _shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{prefix}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return shapes


def _changed(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (values.float() + DELTA * torch.randn(values.shape, generator=generator)).bfloat16()


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    """Of all linear layers, none of the embeddings."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith("model.layers."):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.02 * torch.randn(RANK, shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(shape[0], RANK, generator=generator)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
