"""Names of tensors as data: one table of templates, read both ways.

Three layouts of a mixture-of-experts block are met here:
- `hub`: what is published and what every tool loads: one tensor an expert and projection;
- `autoep`: what DeepSpeed's AutoEP trains: one stacked tensor a projection, (experts, out, in);
- the dense FFN that an expert is made from.
All other tensors have the same name in all layouts.
"""

import re
from dataclasses import dataclass

PROJECTIONS = ("gate", "up", "down")  # SwiGLU: down(silu(gate(x)) * up(x))

DENSE_FFN = {p: f"model.layers.{{layer}}.mlp.{p}_proj.weight" for p in PROJECTIONS}


@dataclass(frozen=True)
class MoeNames:
    """Templates of one MoE family. `experts[p]` has {layer} and {expert}, the others {layer} only."""

    hub_router: str
    hub_experts: dict[str, str]
    autoep_router: str
    autoep_experts: dict[str, str]


_AUTOEP_ROUTER = "model.layers.{layer}.mlp.router.gate.weight"
_AUTOEP = {
    "gate": "model.layers.{layer}.mlp.experts.w1",
    "up": "model.layers.{layer}.mlp.experts.w3",
    "down": "model.layers.{layer}.mlp.experts.w2",
}

MOE = {
    "mixtral": MoeNames(
        hub_router="model.layers.{layer}.block_sparse_moe.gate.weight",
        hub_experts={
            "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        },
        autoep_router=_AUTOEP_ROUTER,
        autoep_experts=_AUTOEP,
    ),
    "qwen3_moe": MoeNames(
        hub_router="model.layers.{layer}.mlp.gate.weight",
        hub_experts={p: f"model.layers.{{layer}}.mlp.experts.{{expert}}.{p}_proj.weight" for p in PROJECTIONS},
        autoep_router=_AUTOEP_ROUTER,
        autoep_experts=_AUTOEP,
    ),
}


def match(template: str, name: str) -> dict[str, int] | None:
    """The numbers in `name` when it has the template's form: match("l.{layer}.w", "l.3.w") == {"layer": 3}."""
    pattern = re.escape(template)
    for field in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + field + "}"), rf"(?P<{field}>\d+)")
    found = re.fullmatch(pattern, name)
    return {field: int(number) for field, number in found.groupdict().items()} if found else None
