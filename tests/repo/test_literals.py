"""Law 12: no shape, layer count, expert count or alignment count is a literal in the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "h3scale"
ROOMS = ("model", "merge", "fusion", "train", "checkpoint", "evaluation", "data")
COUNTS = {
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "num_layers",
    "num_hidden_layers",
    "num_alignments",
    "num_classes",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
}


def is_count(node: ast.expr) -> bool:
    """An integer above 1: what a count of layers, experts or alignments would be."""
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value > 1


def names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def literals(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            yield from (node for argument in node.args if is_count(argument))
        if isinstance(node, ast.keyword) and node.arg in COUNTS and is_count(node.value):
            yield node.value
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_count(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (node for target in targets if set(names(target)) & COUNTS)
        if isinstance(node, ast.Compare | ast.BinOp) and set(names(node)) & COUNTS:
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.left, node.right]
            yield from (node for side in sides if is_count(side))


def test_no_count_of_a_model_is_a_literal() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]
        for room in ROOMS
        for path in sorted((ROOT / room).glob("*.py"))
        for node in literals(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_the_search_finds_what_the_published_code_has() -> None:
    for line in (
        "for layer in range(32): pass",
        "one_hot(x, num_classes=3)",
        "num_experts = 3",
        "if config.num_hidden_layers == 32: pass",
    ):
        assert list(literals(ast.parse(line))), line
