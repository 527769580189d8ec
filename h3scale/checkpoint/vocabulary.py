"""Which token has which id, and rows of embeddings put in the order of another tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from h3scale.checkpoint.shards import read_json
from h3scale.errors import DataError

_FILE = "tokenizer.json"
_PIECES = "tokenizer.model"
_PLAIN = "vocab.json"
_ADDED, _SETTINGS = "added_tokens.json", "tokenizer_config.json"  # beside a file that has the other tokens only
_LISTED = 20


@dataclass(frozen=True)
class Ids:
    """The id of every token. `kind`: ids of two kinds say nothing of each other."""

    kind: str
    of_token: dict[str, int]


def known_ids(folder: Path) -> Ids | None:
    """From tokenizer.json, or else vocab.json or tokenizer.model and what is added to them; None where none of them is there."""
    file = _file_of_ids(folder)
    if file is None:
        return None
    if file.name == _FILE:
        return Ids("tokens", vocabulary(folder))
    found = read_json(file) if file.name == _PLAIN else _pieces(file)
    return Ids("tokens", found | _added(folder)) if found is not None else Ids("ranks", _ranks(file))


def has_same_ids(one: Path, other: Path) -> bool:
    """Whether the ids of two folders are in equal files, byte for byte."""
    file, others = _file_of_ids(one), _file_of_ids(other)
    if file is None or others is None or file.name != others.name or file.read_bytes() != others.read_bytes():
        return False
    return file.name == _FILE or _added(one) == _added(other)


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


def _file_of_ids(folder: Path) -> Path | None:
    return next((folder / name for name in (_FILE, _PLAIN, _PIECES) if (folder / name).is_file()), None)


def _added(folder: Path) -> dict[str, int]:
    """Tokens that stand beside the vocabulary, in either of the files that transformers has written them to."""
    found = dict(read_json(folder / _ADDED)) if (folder / _ADDED).is_file() else {}
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    return found | {token["content"]: int(i) for i, token in (settings.get("added_tokens_decoder") or {}).items()}


def _pieces(path: Path) -> dict[str, int] | None:
    """Of a SentencePiece model; None for another file."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        return None
    return {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}


def _ranks(path: Path) -> dict[str, int]:
    """Of a file that is no SentencePiece model: its lines (tiktoken has a token in base64 and its rank in each)."""
    return {line.decode("utf-8", "replace"): i for i, line in enumerate(path.read_bytes().splitlines())}
