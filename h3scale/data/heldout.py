"""Which training prompts are in an evaluation file, or nearly so."""

import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h3scale.data.adapters import SPEAKER, transcript
from h3scale.data.duplicates import digest_of_words, words
from h3scale.data.lines import read_lines
from h3scale.data.records import BadRow, joined, kind_of, names_of, optional_text, parse_line, text_of
from h3scale.data.store import Tokens
from h3scale.errors import DataError, MissingInputError

MAX_SHOWN = 20  # findings printed before "and N more"


class Heldout:
    """Evaluation prompts, to ask whether a training prompt is one of them or nearly so.

    Exact: two sets of words with a Jaccard similarity of t share a word among the |x| - ceil(t|x|) + 1 rarest of each, and far
    enough from the end that t can still be reached (prefix filtering: Bayardo et al. 2007, "Scaling up all pairs similarity
    search"; positional filtering: Xiao et al. 2008, "Efficient similarity joins for near duplicate detection").

    Shape suffixes: E evaluation prompts, W their words, I those of them in the index, V words of the vocabulary.
    """

    def __init__(self, prompts: Sequence[str], similarity: float = 0.7):
        self.similarity = similarity
        self._exact: dict[int, int] = {}
        self._rank: dict[bytes, int] = {}
        ids, sizes = array("I"), array("q")
        for index, prompt in enumerate(prompts):
            listed = words(prompt)
            self._exact.setdefault(digest_of_words(listed), index)
            distinct = dict.fromkeys(listed)
            ids.extend(self._rank.setdefault(word, len(self._rank)) for word in distinct)
            sizes.append(len(distinct))
        self._sizes_E = np.array(sizes, np.int64)
        self._starts_E = np.cumsum(self._sizes_E) - self._sizes_E
        self._index(np.array(ids, np.int64))

    def _index(self, ids_W: NDArray[np.int64]) -> None:
        """Renames words by rank, the rarest first, and lists for each rank the prompts that have it among their rarest words."""
        frequency_V = np.bincount(ids_W, minlength=len(self._rank))
        rank_V = np.argsort(np.argsort(frequency_V, kind="stable"))
        self._rank = dict(zip(self._rank, rank_V.tolist(), strict=True))
        owners_W = np.repeat(np.arange(len(self._sizes_E)), self._sizes_E)
        self._ranks_W = rank_V[ids_W]
        self._ranks_W = self._ranks_W[np.lexsort((self._ranks_W, owners_W))].astype(np.uint32)
        places_W = np.arange(len(ids_W)) - self._starts_E[owners_W]
        least_E = np.ceil(self.similarity * self._sizes_E - 1e-9)
        indexed = np.flatnonzero(places_W <= (self._sizes_E - least_E)[owners_W])
        indexed = indexed[np.argsort(self._ranks_W[indexed], kind="stable")]
        self._owners_I, self._places_I = owners_W[indexed].astype(np.int32), places_W[indexed].astype(np.int32)
        self._counts_V = np.bincount(self._ranks_W[indexed], minlength=len(self._rank))
        self._starts_V = np.cumsum(self._counts_V) - self._counts_V

    def leaks(self, prompts: Sequence[str]) -> list[int]:
        """For each prompt the index of the evaluation prompt that it is the same as, or else nearest to, or -1."""
        return [self._leak(prompt) for prompt in prompts]

    def _leak(self, prompt: str) -> int:
        listed = words(prompt)
        distinct = set(listed)
        known = [self._rank[word] for word in distinct if word in self._rank]
        least = math.ceil(self.similarity * len(distinct) - 1e-9)
        if len(known) < least:
            return -1
        exact = self._exact.get(digest_of_words(listed), -1)
        return exact if exact >= 0 or not known else self._nearest(np.array(sorted(known)), len(distinct), least)

    def _nearest(self, known: NDArray[np.int64], size: int, least: int) -> int:
        """By the ranks of the words that are known of `size` words; the others, which no evaluation prompt has, are the rarest."""
        prefix = known[: len(known) - least + 1]
        counts = self._counts_V[prefix]
        found = _spans(self._starts_V[prefix], counts)
        owners = self._owners_I[found]
        left = np.repeat(len(known) - np.arange(len(prefix)), counts)  # words from the shared one on
        others = self._sizes_E[owners]
        reachable = np.minimum(left, others - self._places_I[found])
        reached = reachable * (1 + self.similarity) >= self.similarity * (size + others) - 1e-9
        candidates = np.unique(owners[reached])
        if not len(candidates):
            return -1
        sizes = self._sizes_E[candidates]
        theirs = self._ranks_W[_spans(self._starts_E[candidates], sizes)]
        shared = np.add.reduceat(np.isin(theirs, known).astype(np.int64), np.cumsum(sizes) - sizes)
        similarity = shared / (size + sizes - shared)
        best = int(similarity.argmax())
        return int(candidates[best]) if similarity[best] >= self.similarity else -1


def _spans(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... `counts[0]` of them, then from starts[1] on, and so on."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def seen_prompts(heldout: Tokens, training: Tokens) -> NDArray[np.int64]:
    """The numbers of held-out records whose prompt, token by token, some training record has too; only labelled records count.

    Both must be of the same tokenizer. Of a conversation the prompt is as many tokens from its start as are not answers.
    """
    known = {prompt for _, prompt in _prompts(heldout)}
    found = {prompt for _, prompt in _prompts(training) if prompt in known}
    return np.array([i for i, prompt in _prompts(heldout) if prompt in found], np.int64)


def _prompts(records: Tokens) -> Iterator[tuple[int, bytes]]:
    sizes = (records.lengths - records.responses).tolist()
    starts = records.starts.tolist()
    for i in np.flatnonzero(records.labels >= 0).tolist():
        yield i, (records.tokens[starts[i] : starts[i] + sizes[i]] & records.id_mask).tobytes()


def heldout_prompts(path: str | Path) -> list[str]:
    """The prompts of an evaluation file of JSON lines, one a line: `prompt`, `question`, `instruction` (with `input`), the user
    turns of `messages`, or those of a preference's `chosen` where it is a whole conversation.

    Raises MissingInputError (66) if there is no such file, DataError (65) for every line without a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    if path.suffix in (".parquet", ".csv"):
        raise DataError(f"{path}: an evaluation file must be JSON lines (works: .jsonl, .jsonl.gz)")
    prompts: list[str] = []
    findings: list[str] = []
    for number, line in enumerate(read_lines(str(path), path.suffix == ".gz"), start=1):
        if isinstance(line, bytes) and line.isspace():
            continue
        try:
            if isinstance(line, str):
                raise BadRow(line)
            prompts.append(_prompt(parse_line(line)))
        except BadRow as error:
            findings.append(f"{path}:{number}: {error}")
    if not prompts and not findings:
        findings = [f"{path}: is empty (works: a JSON object with a prompt on each line)"]
    if findings:
        more = [f"and {len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []
        raise DataError(findings[:MAX_SHOWN] + more)
    return prompts


def _prompt(row: dict[str, Any]) -> str:
    chosen = row.get("chosen")
    if type(chosen) is list and any(type(turn) is dict and turn.get("role") == "user" for turn in chosen):
        return _user_turns(chosen, "chosen")
    key = next((key for key in ("prompt", "question", "instruction", "messages") if row.get(key) is not None), None)
    if key is None and type(chosen) is str and SPEAKER.search(chosen):
        history, prompt, _ = transcript(chosen, "chosen")
        return "\n\n".join([*(content for role, content in history if role == "user"), prompt])
    if key is None:
        raise BadRow(f"no prompt (found: {names_of(row)}; works: prompt, question, instruction, messages)")
    if type(row[key]) is list:
        return _user_turns(row[key], key)
    text = text_of(row, key)
    return joined(text, optional_text(row, "input")) if key == "instruction" else text


def _user_turns(messages: list[Any], key: str) -> str:
    turns = []
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise BadRow(f"{key}.{index}: expected an object with role and content, found {kind_of(message)}")
        if message.get("role") == "user":
            turns.append(text_of(message, "content", f"{key}.{index}."))
    if not turns:
        raise BadRow(f"{key}: no user turn")
    return "\n\n".join(turns)
