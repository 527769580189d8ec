"""All losses of one global batch in float64, by plain transformers and autograd in one process, written out token by token.

Nothing of h3scale's own mathematics is used here. Shape suffixes: T tokens, E experts, L layers, H hidden.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import PROMPT, RESPONSE, Batch, collate
from h3scale.data.encode import encode_records
from h3scale.data.loader import TypedLoader
from h3scale.data.sources import read_records
from h3scale.data.store import Tokens
from h3scale.model.experts import ExpertMap
from h3scale.model.start import load_model, load_tokenizer
from h3scale.model.trainable import freeze

ROLES = {"prompt": [PROMPT], "response": [RESPONSE], "both": [PROMPT, RESPONSE]}


@dataclass
class Reference:
    """`terms`: the losses without their weights, each a scalar with a graph; `lm/ALIGNMENT` too."""

    model: Any
    terms: dict[str, Tensor]

    def gradients(self, recipe: TrainRecipe) -> dict[str, Tensor]:
        """Of the weighted sum of the losses, under DeepSpeed's names."""
        router, terms = recipe.router, self.terms
        total = terms["lm"] + terms.get("drift", 0)
        if "router" in terms:
            total = total + router.loss_weight * terms["router"] + router.z_weight * terms["router_z"]
            total = total + router.balance_weight * terms["router_balance"]
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)  # shared by all cases
        gradients = {}
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            if name.endswith("gate_up_proj"):
                prefix = name.removesuffix("gate_up_proj")
                gradients[f"{prefix}w1"], gradients[f"{prefix}w3"] = gradient.chunk(2, dim=1)
            else:
                name = name.replace("experts.down_proj", "experts.w2").replace("mlp.gate.weight", "mlp.router.gate.weight")
                gradients[name] = gradient
        return gradients


class Forward:
    """The forward of the first global batch, once for all cases: logits, and what each layer's experts were given."""

    def __init__(self, folder: Path, recipe: TrainRecipe):
        self.model = load_model(folder).double()
        self.experts = ExpertMap.from_config(self.model.config)
        freeze(self.model, recipe.trainable)
        self.inputs_LTH: list[Tensor] = []
        if self.experts:
            self.model.set_experts_implementation("eager")  # the grouped kernels know no float64
            for layer in self.model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda _, inputs: self.inputs_LTH.append(inputs[0].detach().flatten(0, 1)))
        tokenizer = load_tokenizer(folder)
        tokens = Tokens.of(
            encode_records(tokenizer, read_records(recipe.data.records)), self.experts.alignments if self.experts else None
        )
        self.alignments = list(tokens.alignments)
        rows = TypedLoader(tokens, recipe.data, seed=recipe.seed).batch(0).rows
        self.batch: Batch = collate(rows, tokens, recipe.data.sequence_length, tokenizer.pad_token_id, recipe.data.prompt_weight)
        extra = {"output_router_logits": True} if self.experts else {}
        self.output = self.model(input_ids=self.batch.input_ids, position_ids=self.batch.position_ids, use_cache=False, **extra)

    def losses(self, recipe: TrainRecipe, start_share: float) -> Reference:
        """`start_share`: the experts' start is so much of their weights."""
        terms = self.lm()
        if self.experts:
            terms |= self.router(recipe)
            if any(self.gammas(recipe)):
                kind = self.drift_of_weights if recipe.drift.kind == "weights" else self.drift_of_activations
                terms["drift"] = kind(recipe, start_share)
        return Reference(self.model, terms)

    def lm(self) -> dict[str, Tensor]:
        weights_T = self.batch.target_weights.flatten().double()
        nll_T = F.cross_entropy(self.output.logits.flatten(0, 1), self.batch.targets.flatten(), reduction="none")
        nll_T = torch.where(weights_T > 0, nll_T, 0)
        terms = {"lm": (nll_T * weights_T).sum() / weights_T.sum()}
        for a, alignment in enumerate(self.alignments):
            mine_T = weights_T * (self.batch.alignment_ids.flatten() == a)
            terms[f"lm/{alignment}"] = (nll_T * mine_T).sum() / mine_T.sum()
        return terms

    def router(self, recipe: TrainRecipe) -> dict[str, Tensor]:
        assert self.experts
        labels, roles = self.batch.alignment_ids.flatten().tolist(), self.batch.roles.flatten().tolist()
        voting = [t for t, role in enumerate(roles) if role in ROLES[recipe.router.vote]]
        own = {a: self.experts.experts_of(alignment) for a, alignment in enumerate(self.alignments)}
        router, z, balance = [], [], []
        for logits_TE in self.output.router_logits:
            best = {t: own[labels[t]][int(logits_TE[t, own[labels[t]]].argmax())] for t in voting}
            taken = {a: [best[t] for t in voting if labels[t] == a] for a in own}
            for t in voting:
                mine = own[labels[t]]
                router.append(logits_TE[t, self.experts.labelled].logsumexp(-1) - logits_TE[t, mine].logsumexp(-1))
                z.append(logits_TE[t].logsumexp(-1).square())
                probs = logits_TE[t, mine].softmax(-1)
                shares = [taken[labels[t]].count(e) / len(taken[labels[t]]) for e in mine]
                balance.append(len(mine) * sum(share * p for share, p in zip(shares, probs, strict=True)))
        terms = {"router": router, "router_z": z, "router_balance": balance}
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def gammas(self, recipe: TrainRecipe) -> list[float]:
        assert self.experts
        return [recipe.drift.gammas.get(a or "general", recipe.drift.gamma) for a in self.experts.experts]

    def drift_of_weights(self, recipe: TrainRecipe, start_share: float) -> Tensor:
        drift = torch.zeros((), dtype=torch.float64)
        layers = self.model.model.layers
        for layer in layers:
            for e, gamma in enumerate(self.gammas(recipe)):
                weights = [layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e]]
                starts = [start_share * w.detach() for w in weights]
                distance = sum((w - s).square().sum() for w, s in zip(weights, starts, strict=True))
                drift = drift + gamma / len(layers) * distance / sum(s.square().sum() for s in starts)
        return drift

    def drift_of_activations(self, recipe: TrainRecipe, start_share: float) -> Tensor:
        drifts = []
        gammas, top_k = self.gammas(recipe), self.model.config.num_experts_per_tok
        for layer, inputs_TH, logits_TE in zip(self.model.model.layers, self.inputs_LTH, self.output.router_logits, strict=True):
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            for x_H, chosen in zip(inputs_TH, logits_TE.topk(top_k).indices.tolist(), strict=True):
                for e in chosen:
                    found = swiglu(x_H, gate_up[e], down[e])
                    wanted = swiglu(x_H, start_share * gate_up[e].detach(), start_share * down[e].detach())
                    size = wanted.square().sum() if x_H.any() else 1  # the embedding of padding is zero: nothing in, nothing out
                    drifts.append(gammas[e] * (found - wanted).square().sum() / size)
        return torch.stack(drifts).mean()


def swiglu(x_H: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x_H).chunk(2)
    return down @ (F.silu(gate) * up)
