"""Random models that train in seconds, of every family, and a tokenizer that needs no training: for `model=tiny` and tests."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from h3scale.config.base import find
from h3scale.config.fuse import FuseRecipe
from h3scale.config.recipe import TrainRecipe
from h3scale.config.tiny import ALIGNMENTS, toy_lines
from h3scale.log import logger
from h3scale.model.experts import ExpertMap
from h3scale.model.families import moe_config

SPECIAL = ("<pad>", "<s>", "</s>")
TOP_K = 2  # two experts a token, as recipes have it
# No size equals another, so that a transposed or swapped one is noticed.
SIZES: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # far from zero, so that attention and FFN matter in the logits
    "tie_word_embeddings": False,
}
# What sets a dense family apart from the others: heads wider than hidden_size / heads, windows shorter than a row.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 12, "sliding_window": 3},
    "qwen3": {"head_dim": 12, "attention_bias": True},
}


def make_models(recipe: TrainRecipe | FuseRecipe) -> None:
    """Makes the folders that a recipe under `model=tiny` starts from, unless they are there; says what was replaced.

    Every rank may call this: the values are the same for all, and the first who is ready leaves the folder.
    """
    for line in toy_lines(recipe.model_dump()):
        logger.info(line)
    family = str(recipe.family)
    if isinstance(recipe, FuseRecipe):
        _once(Path(recipe.base), lambda: random_dense(tiny_config(family)))
        for seed, folder in enumerate(recipe.models.values(), start=1):
            _once(Path(folder), lambda seed=seed: _aligned(random_dense(tiny_config(family)), seed))  # type: ignore[misc]
    elif Path(str(recipe.model)).name == family:
        _once(Path(str(recipe.model)), lambda: random_dense(tiny_config(family)))
    else:
        _once(Path(str(recipe.model)), lambda: _fused(family, tuple(recipe.data.alignments or ALIGNMENTS)))


def tiny_config(family: str, **sizes: Any) -> Any:
    """The transformers config of a tiny dense model; `sizes` go over the ones above."""
    from transformers import AutoConfig

    tokens = {f"{name}_token_id": SPECIAL.index(token) for name, token in zip(("pad", "bos", "eos"), SPECIAL, strict=True)}
    values = {"vocab_size": len(tiny_tokenizer()), **tokens, **SIZES, **FAMILY_SIZES[family], **sizes}
    return AutoConfig.for_model(family, **values)


def random_dense(config: Any, seed: int = 0) -> nn.Module:
    """A model of random weights; the same for the same seed."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def tiny_tokenizer() -> Any:
    """One token a byte: any text can be encoded. Its chat template is the one that base models are given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    pad, begin, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=begin, eos_token=end)
    tokenizer.chat_template = find("recipes/chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def _aligned(model: nn.Module, seed: int) -> nn.Module:
    """The model with noise of its own on the FFNs, in the place of what alignment would have changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if ".mlp." in name:
                values.add_(values.std() * torch.randn(values.shape, generator=generator))
    return model


def _fused(family: str, alignments: tuple[str, ...]) -> nn.Module:
    """One expert an alignment and a general one, all of random weights."""
    from transformers import AutoConfig

    dense = tiny_config(family)
    words = moe_config(dense.to_dict(), ExpertMap.of(alignments, 1, 1), top_k=TOP_K)
    return random_dense(AutoConfig.for_model(words.pop("model_type"), **words))


def _once(folder: Path, make: Callable[[], Any]) -> None:
    if folder.is_dir():
        return
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a second, on every rank
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    make().save_pretrained(str(partial))
    tiny_tokenizer().save_pretrained(str(partial))
    try:
        partial.rename(folder)
    except OSError:  # another rank was first
        shutil.rmtree(partial)
