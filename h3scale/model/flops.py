"""Floating-point operations that a training step needs, from the config alone.

Counted are matrix products, two operations a multiply-add: projections, attention scores, the FFN or the top_k experts a token
goes to, the router, the output head (tied or not). Not counted: looking up embeddings, norms, softmax, the losses themselves,
and whatever is computed twice to save memory. So a quotient with the device's peak is MFU, not HFU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

MULTIPLY_ADD = 2
UP_MATRICES = 2  # gate_proj and up_proj of SwiGLU; down_proj follows


@dataclass(frozen=True)
class Flops:
    """`per_token`: of all products with weights. `per_pair`: of the scores, for each (query, key) pair that attends."""

    per_token: int
    per_pair: int

    def of(self, tokens: int, pairs: int) -> int:
        """Of so many tokens that attend to so many pairs (`attended_pairs`)."""
        return self.per_token * tokens + self.per_pair * pairs


@dataclass(frozen=True)
class _Layer:
    """Elements of the matrices that one token of one layer is multiplied with, and the width of its scores."""

    qkv: int
    scores: int
    out: int
    router: int
    up: int
    down: int

    @property
    def active(self) -> int:
        return self.qkv + self.out + self.router + self.up + self.down


def active_parameters(config: Any) -> int:
    """Elements of all matrices that one token is multiplied with; `config` is a transformers config."""
    return int(config.num_hidden_layers * _layer(config).active + _head(config))


def training_flops(config: Any, trainable: Iterable[str], lora_targets: Iterable[str] = ()) -> Flops:
    """Forward and backward, when the groups of parameters in `trainable` (see model.trainable) are trained.

    Groups in `lora_targets` are tuned by updates: gradients flow to them, their matrices need none, and the updates'
    own products (rank / hidden_size of the matrices') are left out.

    A product costs as much again for the gradient of its weights, if they are trained, and for that of its input, if
    something trained lies before it. With everything trained that is the usual 6 operations a parameter.
    """
    groups = set(trainable)
    everything = "all" in groups
    trained = {g: everything or g in groups for g in ("attention", "norms", "router", "embeddings")}
    trained["ffn"] = everything or bool(groups & {"ffn", "experts"})
    tuned = trained | dict.fromkeys(lora_targets, True)
    layer = _layer(config)
    first = _layer_flops(layer, trained, tuned, flows=trained["embeddings"])
    flows = any(tuned.values())
    later = _layer_flops(layer, trained, tuned, flows=flows)
    head = _cost(_head(config), trained["embeddings"], flows)
    rest = config.num_hidden_layers - 1
    return Flops(first.per_token + rest * later.per_token + head, first.per_pair + rest * later.per_pair)


def attended_pairs(lengths: np.ndarray, window: int | None = None) -> int:
    """(query, key) pairs of causal attention over records of these lengths, which do not see each other.

    `window`: tokens that a query sees at most, itself included (sliding window).
    """
    lengths = lengths.astype(np.int64)
    pairs = lengths * (lengths + 1) // 2
    if window:
        beyond = np.maximum(lengths - window, 0)
        pairs -= beyond * (beyond + 1) // 2
    return int(pairs.sum())


def _layer(config: Any) -> _Layer:
    hidden = config.hidden_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    taken = config.num_experts_per_tok if experts else 1
    inner = getattr(config, "moe_intermediate_size", None) if experts else None
    inner = inner or config.intermediate_size
    return _Layer(
        qkv=hidden * (queries + keys + keys),
        scores=queries,
        out=queries * hidden,
        router=hidden * experts,
        up=taken * UP_MATRICES * hidden * inner,
        down=taken * hidden * inner,
    )


def _head(config: Any) -> int:
    return int(config.hidden_size * config.vocab_size)


def _layer_flops(layer: _Layer, trained: dict[str, bool], tuned: dict[str, bool], flows: bool) -> Flops:
    """`flows`: whether the layer's input needs a gradient."""
    flows = flows or trained["norms"]
    tokens = _cost(layer.qkv, trained["attention"], flows)
    flows = flows or tuned["attention"]
    # queries by keys, then probabilities by values; in backward each has two inputs that need a gradient
    scores = MULTIPLY_ADD * (layer.scores + layer.scores) * (1 + 2 * flows)
    tokens += _cost(layer.out, trained["attention"], flows)
    tokens += _cost(layer.router, trained["router"], flows)
    tokens += _cost(layer.up, trained["ffn"], flows)
    tokens += _cost(layer.down, trained["ffn"], flows or tuned["ffn"])
    return Flops(tokens, scores)


def _cost(elements: int, trained: bool, flows: bool) -> int:
    return MULTIPLY_ADD * elements * (1 + trained + flows)
