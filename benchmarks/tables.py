"""Writes the tables of layers, steps (both also of a GPU) and merges from results/ into README.md: python benchmarks/tables.py.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is there is written anew, the rest is left alone, and so is a
table whose results are not there.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from measure import ROOT
from train_models import TOP_K

Rows = list[dict[str, Any]]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DENSE = "dense, the same rows"
LOADS = {"balanced": "even load", "zipf": "the n-th expert 1/n", "worst": "all to the same two"}


class Size(NamedTuple):
    experts: int
    tokens: int
    inner: int
    dtype: str
    load: str


def layer_table(rows: Rows) -> str:
    """Times of the dense FFN on as many rows, a column for each size; ours bold."""
    return _beside_dense(rows, rows_an_expert=True)


def load_table(rows: Rows) -> str:
    """The same, a column for each load."""
    return _beside_dense(rows)


def _beside_dense(rows: Rows, rows_an_expert: bool = False) -> str:
    cells = {(row["what"], _size(row)): f"{row['beside_dense']:.2f}" for row in rows if "beside_dense" in row}
    cells = {key: cell for key, cell in cells.items() if key[0] != DENSE}
    return _layers("forward and backward, times dense", rows, cells, rows_an_expert)


def layer_gpu_table(rows: Rows) -> str:
    """TFLOP/s of active parameters with their share of the same run's matrix product, a column for each size; ours bold."""
    cells = {(row["what"], _size(row)): f"{row['tflops']:,.0f} ({row['of_matmul']:.0%})" for row in rows if "of_matmul" in row}
    return _layers("TFLOP/s (of the same run's matrix product)", rows, cells)


def _layers(title: str, rows: Rows, cells: Mapping[tuple[str, Size], str], rows_an_expert: bool = False) -> str:
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    lines = [[title, *(_shown(size, sizes) for size in sizes)], ["---"] * (len(sizes) + 1)]
    if rows_an_expert:  # where the load is even
        lines.append(["rows an expert", *(str(size.tokens * TOP_K // size.experts) for size in sizes)])
    for name in dict.fromkeys(name for name, _ in cells):
        found = [cells.get((name, size), "") for size in sizes]
        lines.append([name, *(f"**{cell}**" if cell and name.startswith("h3scale") else cell for cell in found)])
    return _table(lines)


def step_table(rows: Rows) -> str:
    """Real tokens a second of whole steps, ours first."""
    lines = [["whole steps, fp32", "real tokens a second", "h3scale is as many times as fast"], ["---"] * 3]
    lines += [_rate(row) for row in rows if "tokens_per_s" in row]
    return _table(lines)


def step_gpu_table(rows: Rows) -> str:
    """The same, with MFU and the share of the same run's matrix product where they are known."""
    lines = [["whole steps, bf16", "real tokens a second", "h3scale is as many times as fast", "MFU", "of the matrix product"]]
    lines.append(["---"] * 5)
    for row in rows:
        if "tokens_per_s" in row:
            lines.append([*_rate(row), *(f"{row[share]:.0%}" if share in row else "" for share in ("mfu", "of_matmul"))])
    return _table(lines)


def _rate(row: dict[str, Any]) -> list[str]:
    padding = f" ({row['padding']:.0%} padding)" if row["padding"] else ""
    return [row["what"] + padding, f"{row['tokens_per_s']:,.0f}", f"{row['h3scale_is_faster']:.2f}"]


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
    "loads": ("moe_layer.json", "loads", load_table),
    "few_tokens": ("moe_layer.json", "few_tokens", layer_table),
    "step": ("train_step.json", "step", step_table),
    "layer_gpu": ("moe_layer_gpu.json", "layer", layer_gpu_table),
    "loads_gpu": ("moe_layer_gpu.json", "loads", layer_gpu_table),
    "few_tokens_gpu": ("moe_layer_gpu.json", "few_tokens", layer_gpu_table),
    "step_gpu": ("train_step_gpu.json", "step", step_gpu_table),
    "spectral": ("merge_spectral.json", "spectral", spectral_table),
    "oracle": ("merge_spectral.json", "oracle", oracle_table),
}


def tables() -> Iterator[tuple[str, str]]:
    """Each table by its name, of the results that are there; a line for one whose results are not."""
    for name, (file, subject, make) in TABLES.items():
        path = RESULTS / file
        found = json.loads(path.read_text(encoding="utf-8"))["subjects"].get(subject, {}) if path.exists() else {}
        if found.get("rows"):
            yield name, make(found["rows"])
        else:
            print(f"{name}: no '{subject}' in results/{file}, left as it is")


def written(text: str) -> str:
    """The text with its tables as the results have them. ValueError where a table has no place in it."""
    for name, table in tables():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"README.md: no <!-- {name} --> with a <!-- /{name} --> after it")
        text = before + begin + table + end + after
    return text


def _size(row: dict[str, Any]) -> Size:
    return Size(row["experts"], row["tokens"], row["inner"], row["dtype"], row["load"])


def _shown(size: Size, among: list[Size]) -> str:
    """What is not the same, or not bf16, in all that the table has."""
    inner = f", {size.inner:,} wide" if len({each.inner for each in among}) > 1 else ""
    dtype = "" if size.dtype == "bf16" else f", {size.dtype}"
    load = f", {LOADS[size.load]}" if len({each.load for each in among}) > 1 else ""
    return f"{size.experts} experts, {size.tokens:,} tokens{inner}{dtype}{load}"


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("| --- ", "|---").replace("--- |", "---|")


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {README.relative_to(ROOT)}")
