"""The tokenizer and the generation settings fit the model: no id without a row in the embeddings."""

from collections.abc import Iterator
from typing import Any

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, error, warning
from h3scale.checkpoint.shards import GENERATION, TOKENIZER_FILES, read_json

_NO_PADDING = -1  # so say the configs of the first Llamas


def check_special_ids(subject: Subject) -> Iterator[Finding]:
    """Every id in config.json and in the generation config is in the vocabulary."""
    vocab_size = subject.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        return
    generation = read_json(subject.model / GENERATION) if (subject.model / GENERATION).is_file() else {}
    for file, values in (("config.json", subject.config), (GENERATION, generation)):
        for key, value in values.items():
            if not key.endswith(("_token_id", "_token_ids", "suppress_tokens")):
                continue
            where = f"{subject.model / file}: {key}"
            for token_id in value if isinstance(value, list) else [value]:
                if token_id == _NO_PADDING and key == "pad_token_id":
                    yield warning(f"{where}: {token_id} is no token: padding has none")
                elif isinstance(token_id, int) and not 0 <= token_id < vocab_size:
                    yield error(f"{where}: {token_id} is outside the vocabulary of {vocab_size}")


def check_tokenizer(subject: Subject) -> Iterator[Finding]:
    """transformers loads it, its ids are rows of the embeddings, and it ends a text as the config does."""
    path, vocab_size = subject.model, subject.config.get("vocab_size", 0)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield warning(f"{path}: has no tokenizer")
        return
    subject.check_counts()  # transformers reads config.json too, and makes lists of its layers
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as raised:  # transformers raises many kinds for a broken tokenizer, and each is the finding
        yield error(f"{path}: transformers cannot load the tokenizer ({(str(raised).splitlines() or [''])[0][:200]})")
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if max(len(tokenizer), largest + 1) > vocab_size:
        text = f"{path}: the tokenizer has {len(tokenizer)} tokens (largest id {largest}), the model {vocab_size} rows (vocab_size)"
        yield error(text)
    ends = subject.config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and ends != [None] and tokenizer.eos_token_id not in ends:
        yield warning(f"{path}: the tokenizer ends a text with {tokenizer.eos_token_id}, config.json says {ends}")
