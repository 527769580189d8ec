"""Which records say what another one says, and which prompts are in an evaluation file.

All of it looks at `words`, so that case, spacing, sentence punctuation and kinds of quotes make no difference:

    same          equal words in equal order: `digest`, 64 bits
    near          Jaccard similarity of the word triples, estimated from `signatures`: `near_duplicates`
    leak          Jaccard similarity of the sets of words of two prompts, exact: `heldout.Heldout`

Signatures are MinHash as datasketch 2 defines it (scheme affine32, seed 1), equal to its own bit for bit; its permutations are
applied to a block of records at once. Microseconds a record of 80 words, 128 permutations, one core: here 12, of which MinHash 2.4;
datasketch's update_batch 18 for MinHash alone, rensa 0.5.0 7 (0.7, and 6 to hand the numbers to numpy). So rensa is no
faster in the end; it changed its algorithm under one name, while datasketch's schemes have names and stay. Neither library's
index serves a million records: datasketch's takes 5.7 kB and 48 us each, rensa's 0.7 kB, and it flags without comparing.

Shape suffixes: N records, P permutations.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h3scale.data.pages import release

NUM_PERM = 128
TRIPLE = 3  # words a shingle
MISS = 0.01  # pairs exactly at the threshold that may share no band
MAX_LEADERS = 16  # records of one bucket that all others in it are compared with: what keeps crowded buckets linear
PASSES = 4  # over all bands; from the second one on for records whose keeper was dropped itself
CHUNK = 1 << 12  # records hashed at once
PAIRS = 1 << 9  # pairs compared at once: the kernel maps up to 64 KiB of a file around each of their signatures
MAX_CACHED_WORDS = 1 << 17

ASCII_VALUES, BYTE_VALUES = 128, 256
OPERATORS = b"+-*/\\%=<>$#@&|~^"  # parts of words, or 12+7 would be 12-7 and C++ would be C
ALL_BYTES = bytes(range(BYTE_VALUES))
KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789" + OPERATORS + ALL_BYTES[ASCII_VALUES:])
ASCII_FOLD = bytes(code if code in KEPT else ord(" ") for code in ALL_BYTES.lower())
CHARACTER_SCRIPTS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3FFFF))  # no spaces between words

# Odd 64-bit multipliers; which ones does not matter, that they stay does.
MIX = tuple(np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


# --- words ---


class _UnicodeFold(dict[str, str]):
    """Filled as characters are met: punctuation to blanks, dashes to "-", invisible marks to nothing."""

    def __missing__(self, character: str) -> str:
        category = unicodedata.category(character)
        if any(low <= ord(character) <= high for low, high in CHARACTER_SCRIPTS):
            folded = f" {character} "
        elif category in ("Pd", "Cf"):
            folded = "-" if category == "Pd" else ""
        else:
            folded = " " if category[0] in "PZC" else character
        self[character] = folded
        return folded


class _WordHashes(dict[bytes, int]):
    """64 bits of BLAKE2b a word. Python's own hash differs between processes."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        number = self[word] = _hash64(word)
        return number


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_UNICODE_FOLD = _UnicodeFold()
_WORD_HASHES = _WordHashes()


def words(text: str) -> list[bytes]:
    """The words of a text in UTF-8: NFKC, case folded, parted at blanks and at punctuation that is no operator.

    Characters of scripts without spaces are words of their own. A text without any word is one word itself, so that "..." and
    "?!" differ. Depends on Python's Unicode version for characters younger than it, on nothing else.
    """
    folded = text
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = _NOT_ASCII.sub(lambda match: _UNICODE_FOLD[match[0]], folded)
    return folded.encode().translate(ASCII_FOLD).split() or [text.strip().encode("utf-8", "surrogatepass")]


def digest(text: str) -> int:
    """64 bits that two texts share if their words do; two of a million different texts do by chance once in 37 million runs."""
    return digest_of_words(words(text))


def digest_of_words(listed: list[bytes]) -> int:
    return _hash64(b" ".join(listed))


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --- near-duplicates ---


def signatures(texts: Sequence[str], num_perm: int = NUM_PERM) -> NDArray[np.uint32]:
    """(N, P) uint32 MinHash of the set of word triples of each text, or of its words where they are fewer than three.

    For blocks of some thousand texts: about 10 KiB are needed for a text of 80 words.
    """
    return _minhash([words(text) for text in texts], num_perm)


def sign(texts: Sequence[str], num_perm: int = NUM_PERM) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """((N,) digests, (N, P) signatures): both, in less time than one after the other."""
    worded = [words(text) for text in texts]
    return np.array([digest_of_words(listed) for listed in worded], np.uint64), _minhash(worded, num_perm)


def _minhash(worded: list[list[bytes]], num_perm: int) -> NDArray[np.uint32]:
    hashes, starts = _shingles(worded)
    multipliers, offsets = _permutations(num_perm)
    mixed = _mix32(hashes)
    signatures_PN = np.empty((num_perm, len(worded)), np.uint32)
    permuted = np.empty_like(mixed)
    for row in range(num_perm if worded else 0):
        np.multiply(mixed, multipliers[row], out=permuted)
        np.add(permuted, offsets[row], out=permuted)
        np.minimum.reduceat(permuted, starts, out=signatures_PN[row])
    return np.ascontiguousarray(signatures_PN.T)


def _shingles(worded: list[list[bytes]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Hashes of the shingles of all texts behind each other, and where each text's begin."""
    counts = np.array([len(listed) for listed in worded], np.int64)
    hashes = np.fromiter(map(_WORD_HASHES.__getitem__, chain.from_iterable(worded)), np.uint64, counts.sum())
    mixed = hashes * MIX[0]
    long = np.repeat(counts >= TRIPLE, counts)
    mixed[:-2] += np.where(long[:-2], hashes[1:-1] * MIX[1] + hashes[2:] * MIX[2], np.uint64(0))
    words_left = np.repeat(np.cumsum(counts), counts) - np.arange(len(hashes))
    kept = ~long | (words_left >= TRIPLE)
    num_shingles = np.where(counts >= TRIPLE, counts - (TRIPLE - 1), counts)
    return (mixed[kept] >> np.uint64(32)).astype(np.uint32), np.cumsum(num_shingles) - num_shingles


@lru_cache
def _permutations(num_perm: int) -> NDArray[np.uint32]:
    from datasketch import MinHash  # brings scipy: 0.4 s of every process, were it above

    return MinHash(num_perm, seed=1, scheme="affine32").permutations


def _mix32(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's finalizer, which scheme affine32 begins with."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def banding(num_perm: int, threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the longest bands with which at most MISS of the pairs exactly at the threshold share none."""
    fits = [rows for rows in range(1, num_perm + 1) if (1 - threshold**rows) ** (num_perm // rows) <= MISS]
    rows = max(fits, default=1)
    return num_perm // rows, rows


def near_duplicates(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """(N,): for each of the (N, P) signatures the earlier record it is a near-duplicate of, or -1 if it is kept.

    The earlier record is itself kept and at least `threshold` similar by the whole signature: no record goes because of a
    chain of others. What is found of pairs of a true similarity, at threshold 0.85 and 128 permutations (16 bands of 8):
    all of 0.95, 0.97 of 0.90, 0.54 of 0.85, 0.09 of 0.80, 0.004 of 0.75. A pair can also be missed in a bucket with more
    than MAX_LEADERS distinct records if it shares no other.

    One band at a time is sorted: a million signatures take 3 s and 100 MiB beside the memory-mapped file, whose pages are given
    back as they are used.
    """
    need = math.ceil(threshold * signatures.shape[1] - 1e-9)
    bands, rows = banding(signatures.shape[1], threshold)
    keeper = np.full(len(signatures), -1, np.int64)
    for _ in range(PASSES):
        revived = 0
        for first in range(0, bands * rows, rows):
            kept = np.flatnonzero(keeper < 0)
            for duplicates, leaders in _matches(signatures, kept, slice(first, first + rows), need):
                keeper[duplicates] = leaders
            revived += _rehang(signatures, keeper, need)
        if not revived:
            break
    return keeper


def _matches(signatures: Any, kept: NDArray[np.int64], columns: slice, need: int) -> Iterator[tuple[Any, Any]]:
    """(duplicates, their leaders) by one band: a bucket's earliest record leads, then the earliest unlike it, and so on."""
    hashes = _band_hashes(signatures, kept, columns)
    order = np.argsort(hashes, kind="stable")  # stable: earlier records first within a bucket
    hashes = hashes[order]
    same = hashes[1:] == hashes[:-1]
    crowded = np.append(same, False) | np.append(False, same)
    members, bucket = kept[order[crowded[: len(kept)]]], hashes[crowded[: len(kept)]]
    del hashes, order, same, crowded  # a band's arrays are most of the memory, and this generator waits for its caller
    for _ in range(MAX_LEADERS):
        if not len(members):
            return
        leads = np.concatenate(([True], bucket[1:] != bucket[:-1]))
        leaders = members[np.flatnonzero(leads)[np.cumsum(leads) - 1]][~leads]
        members, bucket = members[~leads], bucket[~leads]
        near = _near(signatures, members, leaders, need)
        yield members[near], leaders[near]
        members, bucket = members[~near], bucket[~near]


def _rehang(signatures: Any, keeper: NDArray[np.int64], need: int) -> int:
    """Gives records whose keeper has just been dropped its keeper if that is near too, or keeps them again; how many of these."""
    dropped = np.flatnonzero(keeper >= 0)
    dropped = dropped[keeper[keeper[dropped]] >= 0]
    leaders = keeper[keeper[dropped]]
    near = _near(signatures, dropped, leaders, need)
    keeper[dropped] = np.where(near, leaders, -1)
    return int((~near).sum())


def _band_hashes(signatures: Any, kept: NDArray[np.int64], columns: slice) -> NDArray[np.uint64]:
    """A 64-bit hash of one band of each record; chance collisions cost a comparison and nothing else."""
    hashes = np.zeros(len(kept), np.uint64)
    for start in range(0, len(kept), CHUNK):
        part = signatures[kept[start : start + CHUNK], columns].astype(np.uint64)
        for column in part.T:
            mixed = (hashes[start : start + CHUNK] ^ column) * MIX[0]
            hashes[start : start + CHUNK] = mixed ^ (mixed >> np.uint64(29))
        release(signatures)
    return hashes


def _near(signatures: Any, left: NDArray[np.int64], right: NDArray[np.int64], need: int) -> NDArray[np.bool_]:
    """Which pairs agree in `need` or more of the whole signature."""
    near = np.zeros(len(left), bool)
    for start in range(0, len(left), PAIRS):
        part = slice(start, start + PAIRS)
        near[part] = np.count_nonzero(signatures[left[part]] == signatures[right[part]], axis=1) >= need
        release(signatures)
    return near
