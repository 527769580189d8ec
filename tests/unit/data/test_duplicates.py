"""What counts as the same text, as nearly the same, and as a prompt that an evaluation file has."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.data import duplicates
from h3scale.data.duplicates import (
    MAX_LEADERS,
    MISS,
    banding,
    digest,
    near_duplicates,
    sign,
    signatures,
    words,
)

FEW_WORDS = st.lists(st.sampled_from(list("abcdefghij")), max_size=9).map(" ".join)
SEEDED = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def jaccard(left: set, right: set) -> float:
    return len(left & right) / len(left | right)


def triples(text: str) -> set:
    listed = words(text)
    return set(zip(listed, listed[1:], listed[2:], strict=False)) if len(listed) >= 3 else set(listed)


def random_signatures(count: int, num_perm: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, (count, num_perm), dtype=np.uint32)


def similar_to(rows: np.ndarray, similarity: float, seed: int) -> np.ndarray:
    """Copies in which every entry is new with probability 1 - similarity, as MinHash of such sets would have it."""
    generator = np.random.default_rng(seed)
    new = generator.integers(0, 2**32, rows.shape, dtype=np.uint32)
    return np.where(generator.random(rows.shape) < similarity, rows, new)


# --- words and digests ---


@pytest.mark.parametrize(
    "same",
    [
        [
            "Hello, World!",
            "hello world",
            "  HELLO\n\tworld?! ",
            "\uff28\uff25\uff2c\uff2c\uff2f\u3000world",
            "hello \u2026 world",
        ],
        ["don't", "don\u2019t", "DON'T"],
        ["naïve café", "NAI\u0308VE CAFE\u0301"],
        ["straße", "STRASSE"],
        ["well-known", "well\u2013known"],
        ["zero\u200bwidth", "zerowidth"],
        ["我是。", "我 是", "我是\uff01"],
    ],
)
def test_case_spacing_and_punctuation_make_no_difference(same):
    assert {digest(text) for text in same} == {digest(same[0])}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12+7", "12-7"),
        ("sort it in C", "sort it in C++"),
        ("a b", "b a"),
        ("ab", "a b"),
        ("...", "?!"),
        ("की", "का"),
        ("thanks 🙂", "thanks 🙁"),
        ("我是", "是我"),
    ],
)
def test_what_means_something_else_has_another_digest(one, other):
    assert digest(one) != digest(other)


def test_digests_never_change():
    """As `printf "hello world" | b2sum -l 64` has them, the last byte first."""
    assert digest("Hello, World!") == 0x50B1A332AA338687
    assert digest("Straße 12 + 7 = 19") == 0xFAC401E476BA66EE
    assert digest("") == int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little")


@SEEDED
@given(st.text(st.characters(exclude_categories=["Cf", "Cs"])))  # what stood on both sides of an invisible mark may compose
def test_words_are_folded_for_good(text):
    listed = words(text)
    assert listed
    assert words(b" ".join(listed).decode()) == listed


def test_half_a_surrogate_pair_is_no_error():
    assert words("a \ud800 b") == [b"a", b"b"]
    assert words("\ud800")


# --- signatures ---


def test_signatures_are_datasketchs_bit_for_bit_given_the_same_shingles():
    text = "the quick brown fox jumps over the lazy dog"
    multipliers = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
    hashed = [digest(word) for word in text.split()]  # a word's digest is its hash
    shingles = [sum(m * h for m, h in zip(multipliers, hashed[i:], strict=False)) % 2**64 >> 32 for i in range(len(hashed) - 2)]
    expected = MinHash(32, seed=1, scheme="affine32", hashfunc=int)
    expected.update_batch(shingles)
    assert np.array_equal(signatures([text], 32)[0], expected.digest())


def test_a_signature_does_not_depend_on_the_block_it_is_made_in():
    texts = ["one", "", "one two", "one two three", "one two three four five", "?!", "naïve café is here now"]
    together = signatures(texts, 16)
    assert together.shape == (7, 16)
    assert together.dtype == np.uint32
    for index, text in enumerate(texts):
        assert np.array_equal(signatures([text], 16)[0], together[index])
    assert signatures([], 16).shape == (0, 16)


def test_a_full_cache_of_words_changes_nothing(monkeypatch):
    expected = signatures(["a b c d e f g h"])
    monkeypatch.setattr(duplicates, "MAX_CACHED_WORDS", 3)
    assert np.array_equal(signatures(["a b c d e f g h"]), expected)
    signatures(["i j k l m n o p"])
    assert len(duplicates._WORD_HASHES) <= 3


def test_short_texts_are_compared_by_their_words():
    assert np.array_equal(*signatures(["one two", "two one"]))
    assert not np.array_equal(*signatures(["one two three", "three two one"]))
    assert len(np.unique(signatures(["one two", "one", "two"]), axis=0)) == 3


@SEEDED
@given(st.lists(FEW_WORDS, min_size=2, max_size=2))
def test_agreement_of_signatures_estimates_the_jaccard_similarity(texts):
    left, right = signatures(texts, 512)
    expected = jaccard(*map(triples, texts)) if any(map(str.strip, texts)) else 1.0
    deviation = math.sqrt(expected * (1 - expected) / 512)
    assert abs((left == right).mean() - expected) <= 5 * deviation


def test_sign_is_digests_and_signatures():
    texts = ["Hello, World!", "one two three four"]
    digests, signed = sign(texts)
    assert digests.dtype == np.uint64
    assert digests.tolist() == [digest(text) for text in texts]
    assert np.array_equal(signed, signatures(texts))


def test_other_processes_sign_alike():
    program = (
        "import sys; from h3scale.data.duplicates import sign; d, s = sign(['Hello, World!', 'naïve café, one two', 'x']);"
        "sys.stdout.buffer.write(d.tobytes() + s.tobytes())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert hashlib.sha256(seen.pop()).hexdigest()[:16] == "28d7a5cf04e6e60b"


# --- near-duplicates ---


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("num_perm", [64, 128])
def test_bands_are_the_longest_that_miss_few(num_perm, threshold):
    assert banding(128, 0.85) == (16, 8)
    bands, rows = banding(num_perm, threshold)
    assert bands * rows <= num_perm
    assert (1 - threshold**rows) ** bands <= MISS
    assert rows == num_perm or (1 - threshold ** (rows + 1)) ** (num_perm // (rows + 1)) > MISS


def check_sound(signed: np.ndarray, keeper: np.ndarray, threshold: float) -> None:
    dropped = np.flatnonzero(keeper >= 0)
    assert (keeper[dropped] < dropped).all()
    assert (keeper[keeper[dropped]] == -1).all()
    assert ((signed[dropped] == signed[keeper[dropped]]).mean(axis=1) >= threshold - 1e-9).all()


@SEEDED
@given(st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=40), st.sampled_from([0.5, 0.75, 1.0]))
def test_few_possible_values_agree_with_the_rules_pair_by_pair(rows, threshold):
    signed = np.array(rows, np.uint32)
    keeper = near_duplicates(signed, threshold)
    check_sound(signed, keeper, threshold)
    if threshold == 1:
        first = [rows.index(row) for row in rows]
        assert keeper.tolist() == [-1 if at == index else at for index, at in enumerate(first)]


def test_distinct_records_are_kept_and_none_is_no_error():
    assert (near_duplicates(random_signatures(2000), 0.5) == -1).all()
    assert near_duplicates(random_signatures(0), 0.85).shape == (0,)
    assert near_duplicates(random_signatures(1), 0.85).tolist() == [-1]


def test_a_chain_drops_only_what_is_near_the_kept_one():
    first = random_signatures(1)[0]
    steps = [first.copy()]
    for step in range(1, 4):
        steps.append(steps[-1].copy())
        steps[-1][step * 16 - 16 : step * 16] += np.uint32(1)  # 0.875 of the one before, 0.75 of the one before that
    assert near_duplicates(np.array(steps), 0.85).tolist() == [-1, 0, -1, 2]


def test_a_record_is_kept_again_when_its_keeper_goes():
    oldest = random_signatures(1)[0]
    middle, youngest = oldest.copy(), oldest.copy()
    middle[:16] += np.uint32(1)  # the first two of 16 bands differ, so that `middle` goes after `youngest` has
    youngest[:16] += np.uint32(1)
    youngest[112:] += np.uint32(1)
    assert near_duplicates(np.array([oldest, middle, youngest]), 0.85).tolist() == [-1, 0, -1]


def test_records_that_are_kept_again_find_each_other():
    oldest = random_signatures(1)[0]
    middle = oldest.copy()
    middle[:16] += np.uint32(1)
    youngest = middle.copy()
    youngest[124:] += np.uint32(1)
    cousin = youngest.copy()
    cousin[24::8] += np.uint32(1)  # shares the first three bands with `youngest`, and these are over when `middle` goes
    assert near_duplicates(np.array([oldest, middle, youngest, cousin]), 0.85).tolist() == [-1, 0, -1, 2]


def test_a_bucket_may_have_several_leaders():
    originals = random_signatures(2)
    originals[1, :8] = originals[0, :8]
    copies = originals.copy()
    copies[:, 8::8] += np.uint32(1)
    assert near_duplicates(np.concatenate([originals, copies]), 0.85).tolist() == [-1, -1, 0, 1]


def test_exactly_at_the_threshold_is_near():
    signed = random_signatures(2, 100)
    signed[1, :55] = signed[0, :55]
    assert 0.55 * 100 > 55  # in floats
    assert near_duplicates(signed, 0.55).tolist() == [-1, 0]


@pytest.mark.parametrize(("similarity", "low", "high"), [(0.95, 0.999, 1), (0.9, 0.95, 0.985), (0.85, 0.5, 0.59), (0.75, 0, 0.01)])
def test_documented_recall_among_200k(similarity, low, high, tmp_path):
    planted = 4000
    signed = np.lib.format.open_memmap(tmp_path / "signatures.npy", "w+", np.uint32, (200_000, 128))
    signed[:] = random_signatures(200_000)
    signed[-planted:] = similar_to(signed[:planted], similarity, seed=1)
    keeper = near_duplicates(signed, 0.85)
    check_sound(signed, keeper, 0.85)
    assert (keeper[:-planted] == -1).all()
    found = keeper[-planted:] >= 0
    assert np.array_equal(keeper[-planted:][found], np.flatnonzero(found))
    assert low <= found.mean() <= high


def test_what_was_written_to_a_copy_on_write_map_is_not_lost(tmp_path):
    np.save(tmp_path / "signatures.npy", random_signatures(50))
    signed = np.load(tmp_path / "signatures.npy", mmap_mode="c")
    signed[7] = signed[3]
    assert near_duplicates(signed, 0.85)[7] == 3
    assert np.array_equal(signed[7], signed[3])


def test_crowded_buckets_are_linear(monkeypatch):
    compared = []
    near = duplicates._near
    monkeypatch.setitem(
        near_duplicates.__globals__, "_near", lambda s, left, *rest: compared.append(len(left)) or near(s, left, *rest)
    )
    signed = random_signatures(40_000)
    signed[10_000:20_000] = signed[3]
    signed[20_000:30_000, :8] = signed[5, :8]  # one band in common and nothing else
    keeper = near_duplicates(signed, 0.85)
    assert (keeper[10_000:20_000] == 3).all()
    assert (np.delete(keeper, np.s_[10_000:20_000]) == -1).all()
    assert sum(compared) <= 10_000 + MAX_LEADERS * 10_000 + 20_000  # the last: _rehang looks at few


def test_real_records_against_all_pairs(real_data: Path):
    rows = [json.loads(line) for line in (real_data / "honest.jsonl").read_bytes().splitlines()]
    rows = [row for row in rows if row["source"].startswith("TruthfulQA")][:800]  # several answers to each question
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    keeper = near_duplicates(signatures(texts), 0.85)
    sets = [triples(text) for text in texts]
    nearest = np.array([max((jaccard(sets[i], sets[j]) for j in range(i)), default=0.0) for i in range(len(texts))])
    assert (nearest >= 0.85).sum() > 10
    assert ((keeper >= 0) == (nearest >= 0.85)).mean() > 0.98
    assert all(jaccard(sets[i], sets[keeper[i]]) > 0.7 for i in np.flatnonzero(keeper >= 0))
