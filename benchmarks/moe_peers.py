"""One layer of experts with its router, as each of those computes it that are compared: from the same weights, on the same tokens.

Shape suffixes: T tokens, K experts a token takes, R = T x K rows, E experts, H hidden, I intermediate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_models import TOP_K
from train_peers import LoopedExperts

from h3scale.errors import ConfigError
from h3scale.model.expert_compute import megablocks
from h3scale.model.expert_compute.in_transformers import use_experts as in_transformers
from h3scale.train.expert_compute import use_experts as in_autoep

OURS, OURS_AUTOEP = "h3scale in transformers", "h3scale in AutoEP"
EAGER, GROUPED, BATCHED = "transformers, eager", "transformers, grouped_mm", "transformers, batched_mm"
PUBLISHED, DEEPSPEED = "H3Fusion's scheme", "DeepSpeed, AutoEP"
SPARSE, MEGA_GROUPED = "MegaBlocks dMoE, block-sparse", "MegaBlocks dMoE, grouped"
DENSE = "dense, the same rows"
BATCHED_MAX_TOKENS = 16  # it copies the weights for every token
MOST = 4.0  # how much more the router's logit of a token's first expert is than that of the rest


class NotHere(Exception):
    """What a peer lacks on this machine."""


@dataclass
class Sizes:
    experts: int
    hidden: int
    inner: int
    dtype: torch.dtype
    device: str


@dataclass
class Weights:
    """router (E, H); gate and up (E, I, H), down (E, H, I). The router looks at the first E features alone, which say where to."""

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def draw(cls, sizes: Sizes, seed: int = 0) -> "Weights":
        generator = torch.Generator(sizes.device).manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=sizes.device, dtype=torch.float32)
            return (values * shape[-1] ** -0.5).to(sizes.dtype)

        router = torch.eye(sizes.experts, sizes.hidden, device=sizes.device, dtype=sizes.dtype)
        stacked = (sizes.experts, sizes.inner, sizes.hidden)
        return cls(router, drawn(*stacked), drawn(*stacked), drawn(sizes.experts, sizes.hidden, sizes.inner))


def tokens(sizes: Sizes, count: int, load: str) -> Tensor:
    """(T, H) of random numbers, of which the first E are the router's logits: they make the load of the experts.

    balanced: all alike. zipf: the n-th expert is taken 1/n as often. worst: all tokens take the same two.
    """
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(count, sizes.hidden, generator=generator)
    if load == "balanced":
        first_T = torch.arange(count) % sizes.experts
        chosen_TK = torch.stack([(first_T + place) % sizes.experts for place in range(TOP_K)], dim=-1)
    elif load == "zipf":
        share_E = 1 / torch.arange(1, sizes.experts + 1)
        chosen_TK = torch.multinomial(share_E.expand(count, -1), TOP_K, generator=generator)
    else:
        chosen_TK = torch.arange(TOP_K).expand(count, -1)
    hidden_TH[:, : sizes.experts] = 0.1 * hidden_TH[:, : sizes.experts]
    places = torch.linspace(MOST, MOST / 2, TOP_K).expand(count, -1)
    hidden_TH.scatter_add_(1, chosen_TK, places)
    return hidden_TH.to(sizes.dtype).to(sizes.device)


@dataclass
class Contender:
    """A layer, (T, H) to (T, H); all parameters that it has; and its weights by the names of Weights, as they are laid out there.

    A weight is the parameter itself, a view of it, or those that are stacked; `gradients` lays their gradients out alike.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    named: dict[str, tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Tensor]]]

    @classmethod
    def of(cls, forward: Callable[[Tensor], Tensor], **named: Tensor) -> "Contender":
        """Of parameters that are laid out as those of Weights."""
        return cls(forward, list(named.values()), {name: ([parameter], _alone) for name, parameter in named.items()})

    def clear(self) -> None:
        """Gradients are made anew in every round, by all contenders alike."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Zeros for an expert that no token chose, where it is a parameter of its own."""
        return {
            name: laid_out([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
            for name, (parameters, laid_out) in self.named.items()
        }


def _alone(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def make(name: str, sizes: Sizes, weights: Weights, count: int) -> Contender:
    """NotHere with the reason, where it cannot take part."""
    if name == BATCHED and count > BATCHED_MAX_TOKENS:
        raise NotHere(f"copies the weights for each of {count} tokens")
    if name in (SPARSE, MEGA_GROUPED):
        return _megablocks(sizes, weights, "sparse" if name == SPARSE else "grouped")
    if name == DENSE:
        return _dense(weights)
    if name in (DEEPSPEED, OURS_AUTOEP):
        return _autoep(sizes, weights, ours=name == OURS_AUTOEP)
    return _transformers(name, sizes, weights)


def _transformers(name: str, sizes: Sizes, weights: Weights) -> Contender:
    from transformers import MixtralConfig, MixtralForCausalLM

    kinds = {EAGER: "eager", GROUPED: "grouped_mm", BATCHED: "batched_mm"}
    config = MixtralConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_local_experts=sizes.experts,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
        experts_implementation=kinds.get(name, "eager"),
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    if name == OURS:
        in_transformers(model, "auto")
    layer = model.model.layers[0].mlp.to_empty(device=sizes.device).to(sizes.dtype)
    with torch.no_grad():
        layer.gate.weight.copy_(weights.router)
        layer.experts.gate_up_proj.copy_(torch.cat([weights.gate, weights.up], dim=1))
        layer.experts.down_proj.copy_(weights.down)
    if name == PUBLISHED:
        return _published(LoopedExperts(layer).to(sizes.device, sizes.dtype))
    named = {"router": layer.gate.weight, "gate_up": layer.experts.gate_up_proj, "down": layer.experts.down_proj}
    return Contender.of(lambda hidden_TH: layer(hidden_TH[None])[0], **named)


def _published(layer: LoopedExperts) -> Contender:
    experts: Any = layer.experts
    stacked: dict[str, Any] = {
        name: ([getattr(expert, matrix).weight for expert in experts], torch.stack)
        for name, matrix in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    named = {"router": ([layer.gate.weight], _alone), **stacked}
    return Contender(lambda hidden_TH: layer(hidden_TH[None])[0], list(layer.parameters()), named)


def _autoep(sizes: Sizes, weights: Weights, ours: bool) -> Contender:
    """What DeepSpeed's AutoEP layer does on a rank that has all experts; its experts or ours."""
    from deepspeed.module_inject import auto_ep_layer as autoep
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    with torch.device(sizes.device):
        router = TokenChoiceTopKRouter(sizes.hidden, sizes.experts, None, None, TOP_K, "softmax", True, 1.0, False)
        experts = GroupedExperts(sizes.hidden, sizes.inner, sizes.experts, use_grouped_mm=sizes.device != "cpu")
    layer = nn.ModuleDict({"router": router, "experts": experts}).to(sizes.device, sizes.dtype)
    if ours:
        in_autoep(layer, "auto")
    named = {"router": router.gate.weight, "gate": experts.w1, "up": experts.w3, "down": experts.w2}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(getattr(weights, name))

    def forward(hidden_TH: Tensor) -> Tensor:
        scores_TK, chosen_TK, counts_E = router(hidden_TH, None)
        order_R = torch.argsort(chosen_TK.view(-1), stable=True)
        rows, places, aligned, total = autoep.permute_by_local_expert(hidden_TH[order_R // TOP_K], counts_E)
        rows = autoep.unpermute_by_local_expert(experts(rows, aligned), places, total)
        return autoep.combine_from_routed(
            rows,
            top_scores=scores_TK,
            token_indices_sorted=order_R,
            top_k=TOP_K,
            score_apply="post",
            combine_impl="weighted_sum",
            shape=(1, *hidden_TH.shape),
        )[0]

    return Contender.of(forward, **named)


def _megablocks(sizes: Sizes, weights: Weights, mode: str) -> Contender:
    """MegaBlocks' own layer, which takes gate for w1, up for v1, and down the other way round for w2."""
    try:
        megablocks.load(mode)
    except ConfigError as error:
        raise NotHere(str(error).removeprefix("experts: megablocks").lstrip(": ").split(" (works")[0]) from None
    from megablocks.layers import arguments, dmoe

    settings: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.inner,
        "moe_num_experts": sizes.experts,
        "moe_top_k": TOP_K,
        "moe_normalize_expert_weights": 1,
        "moe_loss_weight": 0.0,
        "mlp_type": "glu",
        "activation_fn": F.silu,
        "bias": False,
        "return_bias": False,
        "fp16": False,
        "bf16": sizes.dtype == torch.bfloat16,
        "device": torch.device(sizes.device),
    }
    args = arguments.Arguments(mlp_impl="grouped", **settings)
    args.mlp_impl = mode  # its constructor refuses block-sparse with Triton >= 3.2; what it gives is checked here
    layer: Any = dmoe.dMoE(args)
    mlp = layer.experts.mlp
    with torch.no_grad():
        layer.router.layer.weight.copy_(weights.router)
        for parameter, value in ((mlp.w1, weights.gate), (mlp.v1, weights.up), (mlp.w2, weights.down.mT)):
            parameter.copy_(value.flatten(0, 1))

    def forward(hidden_TH: Tensor) -> Tensor:
        output = layer(hidden_TH[:, None])
        return (output[0] if isinstance(output, tuple) else output).view_as(hidden_TH)

    named: dict[str, Any] = {
        "router": ([layer.router.layer.weight], _alone),
        "gate": ([mlp.w1], lambda tensors: tensors[0].view_as(weights.gate)),
        "up": ([mlp.v1], lambda tensors: tensors[0].view_as(weights.up)),
        "down": ([mlp.w2], lambda tensors: tensors[0].view_as(weights.down.mT).mT),
    }
    return Contender(forward, list(layer.parameters()), named)


def _dense(weights: Weights) -> Contender:
    """One FFN for all rows: what a layer would cost if experts were free. It has no router, and no peer's numbers."""
    gate, up, down = (weight[0].clone().requires_grad_() for weight in (weights.gate, weights.up, weights.down))

    def forward(hidden_TH: Tensor) -> Tensor:
        rows_RH = hidden_TH.repeat(TOP_K, 1)
        return F.linear(F.silu(F.linear(rows_RH, gate)) * F.linear(rows_RH, up), down)[: len(hidden_TH)]

    return Contender.of(forward, gate=gate, up=up, down=down)


def reference(weights: Weights, hidden_TH: Tensor, grad_TH: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64, an expert at a time, by plain autograd."""
    leaves = {name: value.double().requires_grad_() for name, value in (("hidden", hidden_TH), *vars(weights).items())}
    hidden, router = leaves["hidden"], leaves["router"]
    top_TK, chosen_TK = (hidden @ router.T).softmax(-1).topk(TOP_K)
    share_TK = top_TK / top_TK.sum(-1, keepdim=True)
    output = torch.zeros_like(hidden)
    for expert, (gate, up, down) in enumerate(zip(leaves["gate"], leaves["up"], leaves["down"], strict=True)):
        token, place = torch.where(chosen_TK == expert)
        x = hidden[token]
        answer = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        output = output.index_add(0, token, answer * share_TK[token, place, None])
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_TH.double())
    found = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {**found, "gate_up": torch.cat([found["gate"], found["up"]], dim=1)}
