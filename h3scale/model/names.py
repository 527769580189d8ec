"""Names of tensors as data: one table of templates, read both ways.

Layouts of a mixture-of-experts block that are met here:
- `hub`: what is published and what every tool loads: one tensor an expert and projection;
- `fused`: the modules of transformers 5: gate and up of an expert in one matrix, experts stacked;
- `autoep`: what DeepSpeed's AutoEP trains: one stacked tensor a projection, (experts, out, in);
- `megablocks`: MegaBlocks' dMoE with a gated MLP: the experts' rows one under the other, down transposed (its MLP, as
  DBRX's in transformers, computes act(x @ w1.T) * (x @ v1.T) @ w2);
- `h3fusion`: the modules of the published H3Fusion code, a Llama whose FFNs became lists of FFNs;
- the dense FFN that an expert is made from.
All other tensors have the same name in all layouts.
"""

import re
from dataclasses import dataclass
from functools import cache

PROJECTIONS = ("gate", "up", "down")  # SwiGLU: down(silu(gate(x)) * up(x))

DENSE_FFN = {p: f"model.layers.{{layer}}.mlp.{p}_proj.weight" for p in PROJECTIONS}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # one row a word

HUB, AUTOEP = "hub", "autoep"


@dataclass(frozen=True)
class Place:
    """Where the matrix (out, in) of an expert's projection is: in the tensor that `template` names.

    The tensor is one expert's when the template has {expert}; else it has all experts', stacked (experts, rows, columns) or
    `flat`, (experts * rows, columns). Of an expert's rows these are part `part` of `parts` equal ones. `transposed`:
    (in, out) is what is stored.
    """

    template: str
    part: int = 0
    parts: int = 1
    flat: bool = False
    transposed: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether all experts of a layer are in one tensor."""
        return "{expert}" not in self.template

    def tensor_shape(self, matrix: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
        """The shape of the stored tensor for a matrix (out, in)."""
        rows, columns = reversed(matrix) if self.transposed else matrix
        rows *= self.parts
        if not self.is_shared:
            return rows, columns
        return (num_experts * rows, columns) if self.flat else (num_experts, rows, columns)

    def matrix_shape(self, tensor: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
        """The shape (out, in) of the matrix in a stored tensor of this shape."""
        rows, columns = tensor[-2] // (self.parts * (num_experts if self.flat else 1)), tensor[-1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Layout:
    """Templates of one layout. Those of experts may have {layer} and {expert}, the router's has {layer} only."""

    router: str
    experts: dict[str, Place]


@dataclass(frozen=True)
class MoeNames:
    """All layouts of one MoE family, by name."""

    layouts: dict[str, Layout]

    @property
    def hub_router(self) -> str:
        return self.layouts[HUB].router

    @property
    def hub_experts(self) -> dict[str, str]:
        return {projection: place.template for projection, place in self.layouts[HUB].experts.items()}

    @property
    def autoep_router(self) -> str:
        return self.layouts[AUTOEP].router

    @property
    def autoep_experts(self) -> dict[str, str]:
        return {projection: place.template for projection, place in self.layouts[AUTOEP].experts.items()}


_MLP = "model.layers.{layer}.mlp."
_EXPERTS = f"{_MLP}experts."
_ONE_EACH = Layout(f"{_MLP}gate.weight", {p: Place(f"{_EXPERTS}{{expert}}.{p}_proj.weight") for p in PROJECTIONS})
_EVERYWHERE = {
    "fused": Layout(
        router=f"{_MLP}gate.weight",
        experts={
            "gate": Place(f"{_EXPERTS}gate_up_proj", part=0, parts=2),
            "up": Place(f"{_EXPERTS}gate_up_proj", part=1, parts=2),
            "down": Place(f"{_EXPERTS}down_proj"),
        },
    ),
    AUTOEP: Layout(
        router=f"{_MLP}router.gate.weight",
        experts={"gate": Place(f"{_EXPERTS}w1"), "up": Place(f"{_EXPERTS}w3"), "down": Place(f"{_EXPERTS}w2")},
    ),
    "megablocks": Layout(
        router=f"{_MLP}router.layer.weight",
        experts={
            "gate": Place(f"{_EXPERTS}mlp.w1", flat=True),
            "up": Place(f"{_EXPERTS}mlp.v1", flat=True),
            "down": Place(f"{_EXPERTS}mlp.w2", flat=True, transposed=True),
        },
    ),
}

_BLOCK = "model.layers.{layer}.block_sparse_moe."
_MIXTRAL = Layout(
    router=f"{_BLOCK}gate.weight",
    experts={
        "gate": Place(f"{_BLOCK}experts.{{expert}}.w1.weight"),
        "up": Place(f"{_BLOCK}experts.{{expert}}.w3.weight"),
        "down": Place(f"{_BLOCK}experts.{{expert}}.w2.weight"),
    },
)

MOE = {
    "mixtral": MoeNames({HUB: _MIXTRAL, **_EVERYWHERE, "h3fusion": _ONE_EACH}),
    "qwen3_moe": MoeNames({HUB: _ONE_EACH, **_EVERYWHERE}),
}
LAYOUTS = (HUB, *_EVERYWHERE)  # that every family has


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the hub layout is in another one: in which tensor, and of an expert's matrix where in it."""

    tensor: str
    place: Place | None = None
    expert: int | None = None


def locate(moe: MoeNames, layout: str, name: str) -> Origin:
    """Where a tensor of the hub layout is in `layout`."""
    router = match(moe.hub_router, name)
    if router is not None:
        return Origin(moe.layouts[layout].router.format(**router))
    for projection, place in moe.layouts[HUB].experts.items():
        found = match(place.template, name)
        if found is not None:
            place = moe.layouts[layout].experts[projection]
            return Origin(place.template.format(**found), place, found["expert"])
    return Origin(name)


def hub_shapes(moe: MoeNames, layout: str, name: str, shape: tuple[int, ...], num_experts: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the hub layout that are in a tensor of `layout`, and their shapes: one, or those of many experts."""
    router = match(moe.layouts[layout].router, name)
    if router is not None:
        return {moe.hub_router.format(**router): shape}
    places = moe.layouts[layout].experts
    held = {p: found for p, place in places.items() if (found := match(place.template, name)) is not None}
    if not held:
        return {name: shape}
    return {
        moe.hub_experts[p].format(**{"expert": expert, **found}): places[p].matrix_shape(shape, num_experts)
        for expert in range(num_experts)
        for p, found in held.items()
        if found.get("expert", expert) == expert
    }


def match(template: str, name: str) -> dict[str, int] | None:
    """The numbers in `name` when it has the template's form: match("l.{layer}.w", "l.3.w") == {"layer": 3}."""
    found = _pattern(template).fullmatch(name)
    return {field: int(number) for field, number in found.groupdict().items()} if found else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + field + "}"), rf"(?P<{field}>\d+)")
    return re.compile(pattern)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, from 0; None for embeddings, head and last norm."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
