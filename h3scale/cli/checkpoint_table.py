"""What `checkpoint inspect` prints: one line a fact, only those that apply."""

from collections.abc import Iterator
from typing import Any


def print_inspection(found: Any) -> None:
    """A table of an Inspection (h3scale.checkpoint.inspect)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def _lines(found: Any) -> Iterator[tuple[str, str]]:
    yield "path", found.path
    yield "kind", found.kind + (f", {found.layout} layout" if found.layout else "")
    yield from _training(found)
    yield from _model(found)
    yield "tensors", str(found.num_tensors)
    active = f", {found.num_active_parameters:,} active" if found.num_active_parameters else ""
    yield "parameters", f"{found.num_parameters:,}{active}"
    yield (
        "number formats",
        ", ".join(f"{dtype} {count / max(found.num_parameters, 1):.1%}" for dtype, count in found.dtypes.items()),
    )
    if found.adapter:
        yield "LoRA", ", ".join(f"{key} {value}" for key, value in found.adapter.items() if value is not None)
    yield (
        "on disk",
        f"{_size(found.num_bytes)}: "
        + ", ".join(f"{kind} {_size(num_bytes)} in {count} files" for kind, (count, num_bytes) in found.files.items()),
    )


def _training(found: Any) -> Iterator[tuple[str, str]]:
    if found.step is not None:
        best = " (the best)" if found.step == found.best_step else ""
        yield "step", f"{found.step}{best}" + (f" of {', '.join(map(str, found.steps))}" if found.steps else "")
    if found.world_size is not None:
        yield "topology", f"{found.world_size} ranks, ep_size {found.ep_size}"


def _model(found: Any) -> Iterator[tuple[str, str]]:
    if found.model_type:
        vocabulary = f"vocabulary {found.vocab_size:,}" + ("" if found.has_tokenizer else ", no tokenizer")
        yield "model", f"{found.model_type}, {found.num_layers} layers, {vocabulary}"
    if found.num_experts:
        of = f": {', '.join(found.experts)}" if found.experts else ""
        yield "experts", f"{found.num_experts}, {found.top_k} a token{of}"


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes} B"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} TB"
