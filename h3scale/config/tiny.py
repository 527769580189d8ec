"""`model=tiny` on the command line: any align, train or fuse recipe at toy size, on two CPU ranks, in seconds.

What is replaced is the model (a random one of the recipe's `family`), the records (the built-in ones) and the sizes below. All
else stays as the recipe says: what is trained, LoRA, losses, learning rates, shares, expert parallelism, the DeepSpeed file.
What else is written on the command line goes over these values too, such as `model=tiny steps=20`.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from h3scale.errors import ConfigError

TINY = "model=tiny"
PLACE = Path("tiny")  # all that a tiny run reads and writes lies here, under the current folder
ALIGNMENTS = ("helpful", "harmless", "honest")  # of the built-in records


def toy_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values that take the place of a recipe's own. ConfigError (78), beginning with `where`, if its family is unknown."""
    from h3scale.config.recipe import DenseFamily

    family = values.get("family")
    if family not in get_args(DenseFamily):
        raise ConfigError(
            f"{where}: family: {family!r}: model=tiny makes a model of it (works: {', '.join(get_args(DenseFamily))})"
        )
    return _replaced(values)


def toy_lines(values: dict[str, Any]) -> list[str]:
    """A line for each replaced key, with its value in the recipe that runs."""
    return [f"tiny: {key}: {_shown(_at(values, key))}" for key in _keys(_replaced(values))]


def _replaced(values: dict[str, Any]) -> dict[str, Any]:
    return _fuse(values, values["family"]) if "models" in values else _train(values, values["family"])


def _train(values: dict[str, Any], family: str) -> dict[str, Any]:
    alignments = values["data"].get("alignments") or ALIGNMENTS
    fused = {"experts", "router"} & set(values.get("trainable", []))
    return {
        "model": str(PLACE / (f"{family}-{'-'.join(alignments)}-general" if fused else family)),
        "out": _inside(values["out"]),
        "data": {
            "records": [_builtin()],
            "prepared": str(PLACE / "prepared"),
            "hygiene": {"near_duplicates": None, "heldout": []},  # sentences of a grammar are all alike
            "sequence_length": 512,  # bytes: the tokenizer knows no words
            "rows_per_batch": 4,
        },
        "steps": 4,
        "rows_per_micro_batch": 1,  # two micro-batches a step on each rank: accumulation is part of what is tried
        "ranks": 2,
    }


def _fuse(values: dict[str, Any], family: str) -> dict[str, Any]:
    return {
        "base": str(PLACE / family),
        "models": {alignment: str(PLACE / f"{family}-{alignment}") for alignment in values["models"]},
        "out": _inside(values["out"]),
        "router": {"records": [_builtin()], "heldout_records": [], "records_per_alignment": 16},
    }


def _inside(out: str) -> str:
    """`out`, in the place of tiny runs; one that is there already stays."""
    return out if Path(out).parts[:1] == PLACE.parts else str(PLACE / Path(out).name)


def _builtin() -> str:
    return str(files("h3scale") / "data" / "records_builtin" / "train.jsonl")


def _keys(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{key}.")
        else:
            yield above + key


def _shown(value: Any) -> Any:
    """Sources by their paths, as people write them."""
    return [item["path"] if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
