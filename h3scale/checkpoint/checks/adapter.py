"""A PEFT adapter: every update has both its matrices, of one rank."""

import re
from collections.abc import Iterator

from h3scale.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, error, warning
from h3scale.checkpoint.shards import read_json

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")


def check_adapter(subject: Subject) -> Iterator[Finding]:
    """Pairs A (r, in) and B (out, r) of the rank that adapter_config.json says."""
    config = read_json(subject.path / ADAPTER_CONFIG)
    where = subject.path / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        yield warning(f"{where}: peft_type: {config.get('peft_type')} is not looked into (works: LORA)")
        return
    if not (subject.path / ADAPTER_WEIGHTS).is_file():
        yield error(f"{subject.path}: has no {ADAPTER_WEIGHTS} (only safetensors are read)")
        return
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, spec in subject.weights.specs.items():
        found = _KEY.fullmatch(name)
        if found is not None:
            pairs.setdefault(found["module"], {})[found["part"]] = spec.shape
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            yield error(f"{subject.path}: {module}: only lora_{next(iter(pair))} is there, a pair is needed")
        elif pair["A"][0] != pair["B"][-1] or pair["A"][0] not in ranks:
            yield error(f"{where}: r: {config.get('r')}, but {module} has A {pair['A']} and B {pair['B']}")
    if not pairs:
        yield error(f"{subject.path}: the adapter changes no tensor")
