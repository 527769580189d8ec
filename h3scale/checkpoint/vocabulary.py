"""Which token has which id, from tokenizer.json, and rows of embeddings put in the order of another tokenizer."""

from pathlib import Path

from h3scale.checkpoint.shards import read_json
from h3scale.errors import DataError

_FILE = "tokenizer.json"
_LISTED = 20


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder has a tokenizer.json."""
    return (folder / _FILE).is_file()


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of every token, added ones too."""
    tokenizer = read_json(folder / _FILE)
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    # A unigram model lists [token, score] pairs in the order of their ids.
    ids = dict(vocab) if isinstance(vocab, dict) else {pair[0]: i for i, pair in enumerate(vocab)}
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []})
    return ids


def same_file(one: Path, other: Path) -> bool:
    """Whether two folders have the same tokenizer.json, byte for byte."""
    return (one / _FILE).read_bytes() == (other / _FILE).read_bytes()


def aligned_rows(base: Path, own: Path, num_rows: int, what: str) -> list[int] | None:
    """For each row in the order of `own`'s tokens, the row of the base that has the same token; None where nothing moves.

    A row that `base` has no token for may be any token's: it was never trained. DataError (65) with the tokens for which
    the base has no row. A folder without tokenizer.json uses the other's.
    """
    if not (has_vocabulary(base) and has_vocabulary(own)) or same_file(base, own):
        return None
    old, new = vocabulary(base), vocabulary(own)
    taken = set(old.values())
    lost = [token for token, i in new.items() if token not in old and (i >= num_rows or i in taken)]
    if lost:
        shown = ", ".join(map(repr, sorted(lost, key=new.__getitem__)[:_LISTED])) + (", ..." if len(lost) > _LISTED else "")
        raise DataError(f"{own}: {what} of the base has no row for {len(lost)} added tokens: {shown}")
    tokens = {i: token for token, i in new.items()}
    count = max(num_rows, max(new.values(), default=-1) + 1)
    order = [old.get(tokens[i], i) if i in tokens else i for i in range(count)]
    if order == list(range(num_rows)):
        return None
    if max(order, default=-1) >= num_rows:
        raise DataError(f"{own}: gives ids up to {count - 1}, and {what} of the base has {num_rows} rows")
    return order
