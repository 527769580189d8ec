"""PEFT LoRA adapters on disk: which matrices they change, by how much, and a model with the changes merged into it.

W = W_0 + scale B A in fp32, then the base's dtype; scale is alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA;
`alpha_pattern` and `rank_pattern` are honoured.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.extents import Computed, Stored, joined
from h3scale.checkpoint.shard_files import entries_of
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.source_model import SourceModel
from h3scale.checkpoint.vocabulary import aligned_rows, has_vocabulary
from h3scale.errors import DataError, MissingInputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # PEFT saves them whole where tokens were added

# Settings of PEFT that change what an adapter means; it is refused unless they have one of these values.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also change the base's weights, which the adapter's files do not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class Adapter:
    """An adapter's files.

    Raises MissingInputError (66) without weights, DataError (65) with every setting that is not plain LoRA.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / ADAPTER_CONFIG)
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise MissingInputError(f"{path}: no {ADAPTER_WEIGHTS} (only safetensors are read)")
        findings = [
            f"{path / ADAPTER_CONFIG}: {key}: {self.config[key]!r} (works: {' or '.join(map(repr, allowed))})"
            for key, allowed in _MUST_BE.items()
            if self.config.get(key, allowed[0]) not in allowed
        ]
        if findings:
            raise DataError(findings)

    @cached_property
    def _entries(self) -> dict[str, Stored]:
        found = entries_of(self.path / ADAPTER_WEIGHTS)
        return {name: Stored.at(self.path / ADAPTER_WEIGHTS, spec, offset) for name, (spec, offset) in found.items()}

    @cached_property
    def pairs(self) -> dict[str, dict[str, Stored]]:
        """Of every tensor that the adapter changes, {"A": (r, in), "B": (out, r)}."""
        pairs: dict[str, dict[str, Stored]] = {}
        foreign = []
        for key, values in self._entries.items():
            found = _KEY.fullmatch(key)
            if found:
                pairs.setdefault(f"{found['module']}.weight", {})[found["part"]] = values
            elif key.removeprefix(_PREFIX) not in EMBEDDINGS:
                foreign.append(key)
        if foreign:
            shown = ", ".join(sorted(foreign)[:3])
            raise DataError(f"{self.path}: {len(foreign)} tensors are not LoRA of a linear layer (such as {shown})")
        return pairs

    @property
    def embeddings(self) -> dict[str, Stored]:
        """Embeddings that the adapter has whole, by their names in the model."""
        return {name: self._entries[_PREFIX + name] for name in EMBEDDINGS if _PREFIX + name in self._entries}

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: Path) -> None:
        """DataError (65) with every matrix that the base does not have, or has in another shape."""
        findings = []
        for name, pair in self.pairs.items():
            if set(pair) != {"A", "B"}:
                findings.append(f"{self.path}: {name}: only lora_{next(iter(pair))} is there, a pair is needed")
            elif name not in shapes:
                findings.append(f"{self.path}: changes {name}, which the base {base} does not have")
            else:
                shape = (pair["B"].shape[0], pair["A"].shape[1])
                if shape != shapes[name] or pair["A"].shape[0] != pair["B"].shape[1]:
                    parts = f"A {pair['A'].shape}, B {pair['B'].shape}"
                    findings.append(f"{self.path}: {name}: {parts} do not fit the base's {shapes[name]}")
        if not self.pairs:
            findings.append(f"{self.path}: the adapter changes no tensor")
        if findings:
            raise DataError(findings)

    def scale(self, name: str) -> float:
        """What B A is multiplied by for this tensor."""
        module = name.removesuffix(".weight")
        patterns = self.config.get("alpha_pattern") or {}
        own = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.config["lora_alpha"] if own is None else own
        rank = self.pairs[name]["A"].shape[0]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def merged(self, name: str, base: Stored) -> Computed:
        """The tensor of the base with the adapter's change in it."""
        low_rank, back = self.pairs[name]["A"], self.pairs[name]["B"]
        scale = self.scale(name)

        def rows(start: int, stop: int) -> torch.Tensor:
            delta = back.rows(start, stop).values().float() @ low_rank.values().float() * scale
            return (base.rows(start, stop).values().float() + delta).to(base.dtype)

        return Computed(base.shape, base.dtype, {"weight": base, "lora_A": low_rank, "lora_B": back}, rows)


@dataclass(frozen=True)
class AdaptedModel(SourceModel):
    """A base with an adapter merged into it. `rows`: the embeddings, where the adapter or its tokenizer has others."""

    adapter: Adapter | None = None
    rows: Mapping[str, Stored] | None = None

    def source(self, name: str, transposed: bool = False) -> Stored | Computed:
        assert self.adapter
        if self.rows and name in self.rows:
            return self.rows[name]
        found = super().source(name, transposed)
        return self.adapter.merged(name, found) if name in self.adapter.pairs and isinstance(found, Stored) else found


def adapt(base: SourceModel, path: Path) -> AdaptedModel:
    """A base with the adapter in `path` merged into it; where the two have other tokens, rows go by token.

    Raises DataError (65) for an adapter that is not plain LoRA or not of this base, or with the tokens that have no row.
    """
    adapter = Adapter(path)
    adapter.check(base.shapes, base.path)
    rows = _embeddings(base, adapter)
    num_rows = {values.shape[0] for values in rows.values()} or {base.config["vocab_size"]}
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    known |= {
        "path": path,
        "config": base.config | {"vocab_size": max(num_rows)},
        "shapes": base.shapes | {name: values.shape for name, values in rows.items()},
        "tokenizer": path if has_vocabulary(path) else base.tokenizer,
    }
    return AdaptedModel(**known, adapter=adapter, rows=rows)


def _embeddings(base: SourceModel, adapter: Adapter) -> dict[str, Stored]:
    """The embeddings that are not the base's: the adapter's own, or the base's rows in the order of the adapter's tokens."""
    present = [name for name in EMBEDDINGS if name in base.shapes]
    own = {name: values for name, values in adapter.embeddings.items() if name in present}
    stored = {name: source for name in present if isinstance(source := base.source(name), Stored)}
    found = dict(own)
    for name in present:
        if name not in own:
            order = aligned_rows(base.tokenizer or base.folder, adapter.path, base.shapes[name][0], name)
            if order is not None:
                values = stored[name]
                found[name] = joined([values.row(i) for i in order], (len(order), *values.shape[1:]))
    sizes = {name: found[name].shape[0] if name in found else base.shapes[name][0] for name in present}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{adapter.path}: the embeddings have {sizes} rows (works: an adapter that has both, or neither)")
    grown = max(sizes.values()) - base.shapes[present[0]][0]
    if grown > 0 and not has_vocabulary(adapter.path):
        raise DataError(f"{adapter.path}: adds {grown} rows to the embeddings, and no tokenizer.json says for which tokens")
    return found
