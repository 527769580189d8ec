"""What others do with the same weights and the same records: transformers and torch's AdamW, on one rank.

`python benchmarks/train_peers.py FOLDER STEPS [NAME TRAINABLE]` is a rank of its own that holds all of NAMES, or one.
Shape suffixes: B rows, S tokens a row, T = B x S, H hidden, E experts, K experts a token takes, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import Row
from ranks import serve, timed
from torch import Tensor, nn
from train_models import AS_ON_GPU, ROWS_PER_MICRO_BATCH, SMALL, TOP_K, dense_config, open_loader

from h3scale.checkpoint.shards import ModelFolder
from h3scale.data.collate import IGNORE, PADDING, Batch
from h3scale.data.loader import TypedLoader, rows_of_rank
from h3scale.model.families import expert_size

PUBLISHED_RECORDS = 8  # a micro-batch of the published code: the default of transformers' Trainer
PUBLISHED_GATING = 0.01
CLIP_NORM = 1.0
TRAINED = (".mlp.",)  # as h3scale trains experts and router
EAGER, GROUPED = "transformers, eager experts", "transformers, grouped_mm experts"
PUBLISHED, DENSE = "H3Fusion's scheme", "dense of the same active size"
PADDED = "transformers, grouped_mm experts, padded rows"
PEFT = "transformers, grouped_mm experts, padded rows, LoRA by peft"
LORA: Row = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": ["attention"]}  # as h3scale's recipes say it
NAMES = (EAGER, GROUPED, PUBLISHED, DENSE)


class Peer:
    """A model with its optimizer. `micro_batches` gives a global batch in parts; `gating` adds to the loss of one, or not."""

    def __init__(
        self,
        model: nn.Module,
        micro_batches: Callable[[TypedLoader, Any], list[Batch]],
        gating: "Gating | None" = None,
        trained: Sequence[str] = TRAINED,
    ):
        self.model, self.micro_batches, self.gating = model, micro_batches, gating
        self.trained = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
            self.trained += [parameter] if parameter.requires_grad else []
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, loader: TypedLoader, step: int) -> Row:
        """LM loss and real tokens of one optimizer step on a global batch."""
        batch = loader.batch(step)
        targets, lm, positions = loader.targets_in(batch), 0.0, 0
        for tensors in self.micro_batches(loader, batch):
            positions += tensors.input_ids.numel()
            with self.gating.noted() if self.gating else nullcontext():
                loss_sum = self._lm(tensors)
                loss = loss_sum / targets
                if self.gating:
                    loss = loss + self.gating.loss(tensors) * len(tensors.input_ids) / len(batch.records)
            loss.backward()
            lm += loss_sum.item() / targets
        nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.gating and torch.cuda.is_available():
            torch.cuda.empty_cache()  # as published, after every step
        tokens = loader.tokens_in(batch)
        return {"lm": lm, "tokens": tokens, "padding": 1 - tokens / positions}

    def _lm(self, tensors: Batch) -> Tensor:
        output = self.model(input_ids=tensors.input_ids, position_ids=tensors.position_ids, use_cache=False)
        return F.cross_entropy(output.logits.flatten(0, 1), tensors.targets.flatten(), ignore_index=IGNORE, reduction="sum")


class Gating:
    """H3Fusion's gating loss as published: the mean of the router's probabilities over all layers and positions, padding among
    them, into a cross entropy that takes it for logits. Hooks are set and removed for every micro-batch.
    """

    def __init__(self, model: nn.Module):
        layers: Any = model.get_submodule("model.layers")
        self.gates = [layer.mlp.gate for layer in layers]
        self.probs_TE: list[Tensor] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        self.probs_TE.clear()
        handles = [gate.register_forward_hook(self._note) for gate in self.gates]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, _gate: nn.Module, _inputs: object, logits_TE: Tensor) -> None:
        self.probs_TE.append(logits_TE.softmax(-1))

    def loss(self, tensors: Batch) -> Tensor:
        rows = len(tensors.input_ids)
        means_BE = torch.stack([probs_TE.unflatten(0, (rows, -1)).mean(1) for probs_TE in self.probs_TE]).mean(0)
        return PUBLISHED_GATING * F.cross_entropy(means_BE, tensors.alignment_ids[:, 0])


class LoopedExperts(nn.Module):
    """A Mixtral layer as transformers 4 had it, which H3Fusion is written for: a matrix a module, a loop over the experts."""

    def __init__(self, layer: Any):
        super().__init__()
        self.gate = nn.Linear(*reversed(layer.gate.weight.shape), bias=False)
        self.gate.weight.data.copy_(layer.gate.weight)
        stacked = zip(layer.experts.gate_up_proj.data, layer.experts.down_proj.data, strict=True)
        self.experts = nn.ModuleList(LoopedExpert(*gate_up.chunk(2), down) for gate_up, down in stacked)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1)
        probs_TE = self.gate(hidden_TH).softmax(-1, dtype=torch.float32)
        weights_TK, chosen_TK = probs_TE.topk(TOP_K, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(hidden_TH.dtype)
        output_TH = torch.zeros_like(hidden_TH)
        mask_EKT = F.one_hot(chosen_TK, len(self.experts)).permute(2, 1, 0)
        for expert, mask_KT in zip(self.experts, mask_EKT, strict=True):
            place, token = torch.where(mask_KT)
            output_TH.index_add_(0, token, expert(hidden_TH[token]) * weights_TK[token, place, None])
        return output_TH.view_as(hidden_BSH)


class LoopedExpert(nn.Module):
    def __init__(self, *weights: Tensor):
        super().__init__()
        self.w1, self.w3, self.w2 = (self._linear(weight) for weight in weights)

    @staticmethod
    def _linear(weight: Tensor) -> nn.Linear:
        """Without random values first, which take a CPU minutes at a GPU's sizes."""
        like: Any = {"device": weight.device, "dtype": weight.dtype}
        linear: Any = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), bias=False, **like)
        linear.weight.data.copy_(weight)
        return linear  # type: ignore[no-any-return]

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(hidden_TH)) * self.w3(hidden_TH))  # type: ignore[no-any-return]


def packed(loader: TypedLoader, batch: Any, device: torch.device) -> list[Batch]:
    """The micro-batches that h3scale trains on."""
    return [_to(loader.tensors(rows, 0), device) for rows in rows_of_rank(batch, 0, 1, ROWS_PER_MICRO_BATCH)]


def padded(loader: TypedLoader, batch: Any, device: torch.device, to_all: bool = False) -> list[Batch]:
    """The records of the same global batch, a row each, a few at a time and as wide as the longest of them.

    `to_all`: as the longest of all records, as published.
    """
    found = []
    for first in range(0, len(batch.records), PUBLISHED_RECORDS):
        rows: Sequence[np.ndarray] = [np.array([record]) for record in batch.records[first : first + PUBLISHED_RECORDS]]
        tensors = loader.tensors(rows, 0)
        longest = int(loader.kept.max() if to_all else (tensors.roles != PADDING).sum(-1).max())
        cut = Batch(**{name: tensor[:, :longest] for name, tensor in vars(tensors).items()})
        found.append(_to(cut, device))
    return found


def make(name: str, folder: Path, device: torch.device, trained: Sequence[str] = TRAINED) -> Peer:
    """One of NAMES, PADDED or PEFT, at its start; in bf16 on a GPU."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if name == DENSE:
        fused = ModelFolder(folder / "model").config
        sizes = {name: fused[name] for name in SMALL} | {"intermediate_size": TOP_K * expert_size(fused)}
        return Peer(LlamaForCausalLM(dense_config(sizes)).train().to(device), partial(packed, device=device))
    experts = "grouped_mm" if name in (GROUPED, PADDED, PEFT) else "eager"
    dtype = torch.bfloat16 if AS_ON_GPU else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, experts_implementation=experts).train()
    if name == PEFT:
        return Peer(with_lora(model.to(device)), partial(padded, device=device), trained=(*trained, ".lora_"))
    if name != PUBLISHED:
        rows = padded if name == PADDED else packed
        return Peer(model.to(device), partial(rows, device=device), trained=trained)
    for layer in model.model.layers:
        layer.mlp = LoopedExperts(layer.mlp)
    return Peer(model.to(device, dtype), partial(padded, device=device, to_all=True), Gating(model), trained)


def with_lora(model: Any) -> nn.Module:
    """By peft, with its own defaults but for LORA, on the attention."""
    from peft import LoraConfig, get_peft_model

    from h3scale.model.lora import MODULES

    names = [name for target in LORA["targets"] for name in MODULES[target]]
    settings = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
    return get_peft_model(model, LoraConfig(target_modules=names, **settings))  # type: ignore[no-any-return]


def rank(folder: Path, steps: int, names: Sequence[str] = NAMES, trained: Sequence[str] = TRAINED) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = open_loader(folder, steps, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    peers = {name: make(name, folder, device, trained) for name in names}

    def answer(question: str) -> Row:
        name, _, step = question.rpartition(" ")
        return timed(lambda: peers[name].step(loader, int(step)))

    serve(answer)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        rank(Path(sys.argv[1]), int(sys.argv[2]), [sys.argv[3]], [""] if sys.argv[4] == "all" else TRAINED)
    else:
        rank(Path(sys.argv[1]), int(sys.argv[2]))
