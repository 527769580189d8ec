"""Models in every layout, put together in plain torch from what the owners of the layouts define; no table of names is used.

transformers: gate_up_proj is cat(gate, up) of each expert, stacked. AutoEP: w1, w3, w2 stacked. MegaBlocks and DBRX: w1, v1
and w2 lay the experts' rows one under the other, and y = (act(x @ w1.T) * (x @ v1.T)) @ w2, so w2 is down transposed.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from h3scale.checkpoint.shards import write_json

Tensors = dict[str, torch.Tensor]
WORDS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def tiny_moe(moe_type: str = "mixtral", hidden: int = 8, inner: int = 12, experts: int = 3, layers: int = 2, seed: int = 0, **more):
    """A tiny transformers model with random values, router and experts too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 11}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_experts_per_tok": 2}
    sizes |= {"num_local_experts": experts, "initializer_range": 0.4}
    if moe_type == "qwen3_moe":
        sizes |= {"moe_intermediate_size": inner, "norm_topk_prob": True}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(moe_type, **sizes | more)).eval()


def in_layout(model, layout: str) -> Tensors:
    """The tensors of a transformers mixture of experts under the names and in the shapes of a layout."""
    found: Tensors = {}
    for name, values in model.state_dict().items():
        values = values.detach()
        before, _, part = name.partition(".mlp.")
        if not part:
            found[name] = values
        elif part == "gate.weight":
            found[_router(before, model.config.model_type, layout)] = values
        elif part == "experts.gate_up_proj":
            gate, up = values.chunk(2, dim=1)
            found |= _up_side(before, model.config.model_type, layout, gate, up)
        else:
            found |= _down_side(before, model.config.model_type, layout, values)
    return {name: values.clone().contiguous() for name, values in found.items()}


def _router(before: str, moe_type: str, layout: str) -> str:
    names = {"autoep": "mlp.router.gate.weight", "megablocks": "mlp.router.layer.weight", "fused": "mlp.gate.weight"}
    hub = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight"}[moe_type]
    return f"{before}.{names.get(layout, hub)}"


def _one_each(before: str, moe_type: str, word: int, stacked: torch.Tensor) -> Tensors:
    block = "block_sparse_moe" if moe_type == "mixtral" else "mlp"
    return {f"{before}.{block}.experts.{e}.{WORDS[moe_type][word]}.weight": values for e, values in enumerate(stacked)}


def _up_side(before: str, moe_type: str, layout: str, gate: torch.Tensor, up: torch.Tensor) -> Tensors:
    if layout == "hub":
        return _one_each(before, moe_type, 0, gate) | _one_each(before, moe_type, 1, up)
    if layout == "fused":
        return {f"{before}.mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1)}
    if layout == "autoep":
        return {f"{before}.mlp.experts.w1": gate, f"{before}.mlp.experts.w3": up}
    return {f"{before}.mlp.experts.mlp.w1": torch.cat([*gate]), f"{before}.mlp.experts.mlp.v1": torch.cat([*up])}


def _down_side(before: str, moe_type: str, layout: str, down: torch.Tensor) -> Tensors:
    if layout == "hub":
        return _one_each(before, moe_type, 2, down)
    if layout == "fused":
        return {f"{before}.mlp.experts.down_proj": down}
    if layout == "autoep":
        return {f"{before}.mlp.experts.w2": down}
    return {f"{before}.mlp.experts.mlp.w2": torch.cat([expert.T for expert in down])}


def save_layout(folder: Path, model, layout: str) -> Path:
    """A folder of safetensors in a layout, with config.json."""
    folder.mkdir(parents=True)
    save_file(in_layout(model, layout), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model.config.to_dict())
    return folder
