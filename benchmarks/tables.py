"""Writes the tables of results/{moe_layer,train_step,merge_spectral,merge_oracle}.json into README.md: python benchmarks/tables.py.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is there is written anew, the rest is left alone.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from measure import ROOT
from train_models import TOP_K

Rows = list[dict[str, Any]]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DENSE = "dense, the same rows"


def layer_table(rows: Rows) -> str:
    """Times of the dense FFN on as many rows, a column for each size; ours bold."""
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    beside = {(row["what"], _size(row)): row["beside_dense"] for row in rows if "beside_dense" in row}
    names = [name for name in dict.fromkeys(name for name, _ in beside) if name != DENSE]
    lines = [
        ["forward and backward, times dense", *(_shown(size) for size in sizes)],
        ["---"] * (len(sizes) + 1),
        ["rows an expert", *(str(tokens * TOP_K // experts) for experts, tokens, _ in sizes)],
    ]
    for name in names:
        cells = ["" if (name, size) not in beside else f"{beside[name, size]:.2f}" for size in sizes]
        lines.append([name, *(f"**{cell}**" if cell and name.startswith("h3scale") else cell for cell in cells)])
    return _table(lines)


def step_table(rows: Rows) -> str:
    """Real tokens a second of whole steps, ours first."""
    lines = [["whole steps, fp32", "real tokens a second", "h3scale is as many times as fast"], ["---"] * 3]
    for row in rows:
        if "tokens_per_s" in row:
            padding = f" ({row['padding']:.0%} padding)" if row["padding"] else ""
            lines.append([row["what"] + padding, f"{row['tokens_per_s']:,.0f}", f"{row['h3scale_is_faster']:.2f}"])
    return _table(lines)


def spectral_table(rows: Rows) -> str:
    """How many times as fast as the published path, a row for each matrix."""
    found = {(row["shape"], row["deltas"], row["what"]): row["faster_than_svd"] for row in rows if "faster_than_svd" in row}
    kinds = list(dict.fromkeys((deltas, what) for _, deltas, what in found))
    names = {"h3scale, tsv_m": "TSV-M", "h3scale, resm": "RESM"}
    lines = [["as many times as fast as torch.linalg.svd", *(f"{names[what]}, {deltas}" for deltas, what in kinds)]]
    lines.append(["---"] * (len(kinds) + 1))
    for shape in dict.fromkeys(shape for shape, _, _ in found):
        cells = [found[shape, *kind] for kind in kinds]
        lines.append([shape, *(f"{cell:.1f}" if cell < 100 else f"{cell:,.0f}" for cell in cells)])
    return _table(lines)


def oracle_table(rows: Rows) -> str:
    """Relative Frobenius distance of merged deltas from fp64; of LoRA in stored weights also from what its factors give."""
    lines = [
        ["distance from fp64, TSV-M / RESM", "h3scale", "torch.linalg.svd, fp32", "of the factors: h3scale", "torch.linalg.svd"],
        ["---"] * 5,
    ]
    for deltas in dict.fromkeys(row["deltas"] for row in rows):
        cells = []
        for key in ("error", "from_factors"):
            for way in ("h3scale", "torch.linalg.svd"):
                found = [row[key] for row in rows if row["deltas"] == deltas and row["what"].startswith(way) and key in row]
                cells.append(" / ".join(f"{value:.1e}" for value in found))
        lines.append([deltas, *cells])
    return _table(lines)


TABLES: Mapping[str, tuple[str, str, Callable[[Rows], str]]] = {
    "layer": ("moe_layer.json", "layer", layer_table),
    "step": ("train_step.json", "step", step_table),
    "spectral": ("merge_spectral.json", "spectral", spectral_table),
    "oracle": ("merge_spectral.json", "oracle", oracle_table),
}


def written(text: str) -> str:
    """The text with its tables as the results have them. ValueError where a table has no place in it."""
    for name, (file, subject, make) in TABLES.items():
        rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["subjects"][subject]["rows"]
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"README.md: no <!-- {name} --> with a <!-- /{name} --> after it")
        text = before + begin + make(rows) + end + after
    return text


def _size(row: dict[str, Any]) -> tuple[int, int, str]:
    return row["experts"], row["tokens"], row["dtype"]


def _shown(size: tuple[int, int, str]) -> str:
    experts, tokens, dtype = size
    return f"{experts} experts, {tokens:,} tokens" + ("" if dtype == "bf16" else f", {dtype}")


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("| --- ", "|---").replace("--- |", "---|")


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.relative_to(ROOT)}: {', '.join(TABLES)}")
