"""The records that the data benchmarks run on: public ones from a folder, the built-in ones, or made up to any number."""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from h3scale.config.data import Data
from h3scale.data.mixture import Mixture, mixture
from h3scale.data.prepare import prepare
from h3scale.data.records import Record
from h3scale.data.sources import read_records
from h3scale.data.store import Store
from h3scale.data.tokenizer import train_tokenizer

ALIGNMENTS = ("helpful", "harmless", "honest")
BUILTIN = Path(__file__).parents[1] / "h3scale" / "data" / "records_builtin" / "train.jsonl"
NUM_WORDS = 2000  # of the made-up language
WORDS_MEAN, WORDS_SIGMA, WORDS_CAP = 54, 0.7, 160  # of a made-up record; a word is about two tokens, so about 100 of these
MADE_UP_VOCAB = 4000
MADE_UP_SAMPLE = 5000  # records for its tokenizer
LENGTH_MEAN, LENGTH_SIGMA, LENGTH_CAP = 128.0, 0.7, 300  # before the cap, which makes the mean 109


@dataclass(frozen=True)
class Corpus:
    """Records and what the project makes of them. `texts`: rendered by the chat template, as they are tokenized."""

    name: str
    paths: list[str]
    records: list[Record]
    tokenizer_folder: Path
    tokenizer: Any
    store: Store
    texts: list[str]

    @property
    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in self.paths)).hexdigest()[:16]
        tokens = int(self.store.lengths.sum())
        return {"records": self.name, "sha256": digest, "kept": len(self.store), "tokens": tokens, "vocab": len(self.tokenizer)}


def corpus(data: Path | None, tiny: bool, work: Path) -> Corpus:
    """The three alignments' files of a folder, or the built-in records (with `tiny`, 600 of them)."""
    if data:
        name, paths, vocab = data.name, [str(data / f"{alignment}.jsonl") for alignment in ALIGNMENTS], 8000
    else:
        name, paths, vocab = "built-in", [str(work / "builtin.jsonl")], 1200
        with BUILTIN.open(encoding="utf-8") as file:
            Path(paths[0]).write_text("".join(islice(file, 600 if tiny else None)), encoding="utf-8")
    records = read_records(paths)
    tokenizer = train_tokenizer(records, min(vocab, 600) if tiny else vocab)
    tokenizer.save_pretrained(work / "tokenizer")
    store = prepare(Data(records=list(paths), workers=1), tokenizer, work / "prepared")
    texts = [tokenizer.apply_chat_template(record.messages, tokenize=False) for record in records]
    return Corpus(name, paths, records, work / "tokenizer", tokenizer, store, texts)


def token_lists(store: Store) -> list[list[int]]:
    """The same token ids as plain lists: what other libraries begin with."""
    ids = (store.tokens & store.id_mask).astype(np.int64)
    return [ids[begin:end].tolist() for begin, end in zip(store.starts[:-1], store.starts[1:], strict=True)]


def made_up_lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, labels) of made-up records: lognormal, cut at LENGTH_CAP, three alignments of one size."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(math.log(LENGTH_MEAN) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return np.clip(lengths, 4, LENGTH_CAP).astype(np.int64), np.arange(count) % len(ALIGNMENTS)


def one_epoch(data: Data, lengths: np.ndarray, labels: np.ndarray) -> Mixture:
    """Equal shares until every record was taken once."""
    counts = np.bincount(labels)
    tokens = np.bincount(labels, lengths).astype(np.int64)
    return mixture(data.model_copy(update={"max_epochs": 1.0}), ALIGNMENTS, tokens, counts)


def write_made_up(path: Path, count: int, seed: int = 0) -> None:
    """JSON lines of made-up records, a few at a time; texts are words drawn at random, so no two are near-duplicates."""
    rng = random.Random(seed)
    listed = list(_words(rng))
    log_mean = math.log(WORDS_MEAN) - WORDS_SIGMA**2 / 2
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            size = min(max(int(rng.lognormvariate(log_mean, WORDS_SIGMA)), 6), WORDS_CAP)
            said = rng.choices(listed, k=size)
            cut = max(size // 3, 1)
            row = {
                "alignment": ALIGNMENTS[index % len(ALIGNMENTS)],
                "prompt": " ".join(said[:cut]),
                "response": " ".join(said[cut:]),
            }
            file.write(json.dumps(row) + "\n")


def write_shuffled(path: Path, records: list[Record], copies: int, seed: int = 0) -> None:
    """Each record `copies` times, with its words in other orders: as many and as long words, and no two are near-duplicates."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for record in records:
                said = [record.prompt.split(" "), record.response.split(" ")]
                for listed in said:
                    rng.shuffle(listed)
                prompt, response = (" ".join(listed) for listed in said)
                shuffled = replace(record, id=f"{record.id}/{copy}", prompt=prompt, response=response, history=())
                file.write(shuffled.to_json() + "\n")


def made_up_tokenizer(work: Path, tiny: bool) -> Path:
    """Folder of a tokenizer for made-up records: common words are one piece, others two or three."""
    sample = work / "made-up-sample.jsonl"
    write_made_up(sample, 300 if tiny else MADE_UP_SAMPLE, seed=1)
    train_tokenizer(read_records([sample]), MADE_UP_VOCAB).save_pretrained(work / "made-up-tokenizer")
    return work / "made-up-tokenizer"


def _words(rng: random.Random) -> Iterator[str]:
    """Words that the built-in records use, and made-up ones of their syllables."""
    text = " ".join(str(json.loads(line)["response"]) for line in BUILTIN.open(encoding="utf-8"))
    known = sorted({word.strip(".,?!").lower() for word in text.split() if word.isascii()})
    yield from known
    for _ in range(max(NUM_WORDS - len(known), 0)):
        yield "".join(rng.choice(known)[:3] for _ in range(2))
