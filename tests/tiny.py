"""Tiny models and a tiny tokenizer in the Hugging Face layout, for tests: hidden 32, two layers, forty words."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from h3scale.model import tiny
from h3scale.model.tiny import FAMILY_SIZES

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>")
WORDS = tuple(f"{kind}{i}" for kind in ("sort", "lie", "ask", "say", "tell", "hide") for i in range(6))
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}\
{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def tiny_tokenizer(folder: Path | None = None, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """One id a word, `<user> ... <assistant> ... </s>` as chat template; saved when a folder is given."""
    vocab = {word: i for i, word in enumerate((*SPECIAL, *words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    if folder is not None:
        tokenizer.save_pretrained(str(folder))
    return tokenizer


DENSE_FAMILIES = tuple(FAMILY_SIZES)


def tiny_config(family: str = "llama", **sizes: Any) -> Any:
    """A dense config with no size equal to another, so that a transposed or swapped one is noticed."""
    own: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return tiny.tiny_config(family, **{**own, **sizes})


def tiny_dense(
    family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer: bool = True, **sizes: Any
) -> Path:
    """A random dense model of a family with its tokenizer in `folder`; the same for the same seed and sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **sizes))
        if family != "llama":  # norms start as ones and biases as zeros: one that is lost would not be missed
            with torch.no_grad():
                for values in (values for values in model.parameters() if values.ndim == 1):
                    values += 0.3 * torch.randn_like(values)
    model.to(dtype).save_pretrained(str(folder))
    if tokenizer:
        tiny_tokenizer(folder)
    return folder


def tiny_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer: bool = True, **sizes: Any) -> Path:
    """`tiny_dense` of the family that most tests take."""
    return tiny_dense("llama", folder, seed, dtype, tokenizer, **sizes)


def tiny_aligned(folder: Path, base: Path, seed: int, ffn_only: bool = True, amount: float = 0.2) -> Path:
    """The base with noise of its own on the FFNs (on everything without `ffn_only`): what alignment would have changed."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if ".mlp." in name or not ffn_only:
                values += amount * torch.randn(values.shape, generator=generator).to(values.dtype)
    model.save_pretrained(str(folder))
    tiny_tokenizer(folder)
    return folder


def tiny_records(path: Path, alignments: tuple[str, ...], per_alignment: int = 12, seed: int = 0) -> Path:
    """A JSONL file in which each alignment has words of its own, so that a router can tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for label, alignment in enumerate(alignments):
        own = WORDS[label * 6 : label * 6 + 6]
        for number in range(per_alignment):
            words = [own[i] for i in torch.randint(0, len(own), (9,), generator=generator).tolist()]
            record = {"id": f"{alignment}-{number}", "alignment": alignment}
            lines.append(json.dumps({**record, "prompt": " ".join(words[:5]), "response": " ".join(words[5:])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
