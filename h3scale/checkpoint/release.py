"""A folder fit for publication: the verified model, a model card that says what it is, and checksums."""

import re
import shutil
from pathlib import Path
from typing import Any

from h3scale import __version__
from h3scale.checkpoint.checks.render import CONVERSATIONS
from h3scale.checkpoint.consolidate import write_sums
from h3scale.checkpoint.shard_files import INDEX
from h3scale.checkpoint.shards import (
    GENERATION,
    TOKENIZER_FILES,
    ModelFolder,
    check_output,
    copy_tokenizer,
    new_folder,
    read_json,
    write_json,
)
from h3scale.checkpoint.verify import examine
from h3scale.errors import ConfigError, DataError
from h3scale.log import logger
from h3scale.model import names
from h3scale.model.experts import CONFIG_KEY, SHARED, ExpertMap

_LOCAL_KEYS = ("auto_map", "_name_or_path")  # remote code, and paths of the machine it was made on
_HEALED = ("remote-code", "pickles")  # findings of verify on what a release leaves out
_PAPER = "2411.17792"
MERGE = "merge.json"  # what `h3scale merge` leaves beside the weights


def release(
    model_folder: str | Path,
    target: str | Path,
    *,
    license: str,
    base_model: str | list[str] | None = None,
    evaluation: Path | None = None,
    force: bool = False,
) -> Path:
    """Verifies a model and copies it to `target` with README.md (model card) and SHA256SUMS; nothing is uploaded.

    `license`: an identifier the Hugging Face hub knows, such as apache-2.0. `evaluation`: the JSON of `h3scale evaluate`, of
    records, a suite or both.
    `auto_map` and local paths are dropped from the JSON files. Raises ConfigError (78) without a license, and what
    verify raises.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license or ""):
        raise ConfigError(f"license: '{license}' (works: an identifier such as apache-2.0, mit, llama2; it is required)")
    check_output(target, force)
    scores = _scores(evaluation)
    report = examine(model_folder)
    report.raise_errors(but_for=_HEALED)
    for warning in report.warnings:
        logger.warning("warning: %s", warning)
    source = ModelFolder(model_folder)
    merged = read_json(source.path / MERGE) if (source.path / MERGE).is_file() else None
    with new_folder(target, force) as folder:
        for file in sorted(set(source.files.values())):
            shutil.copyfile(source.path / file, folder / file)
        if (source.path / INDEX).is_file():
            shutil.copyfile(source.path / INDEX, folder / INDEX)
        copy_tokenizer(source.path, folder)
        for file in ("config.json", GENERATION, "tokenizer_config.json"):
            if (source.path / file).is_file():
                values = read_json(source.path / file)
                write_json(folder / file, {key: value for key, value in values.items() if key not in _LOCAL_KEYS}, hide=False)
        card = model_card(source.config, Path(target).name, license, base_model, scores, _conversation(source.path), merged)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_sums(folder)
    return Path(target)


def model_card(
    config: dict[str, Any],
    name: str,
    license: str,
    base_model: str | list[str] | None,
    scores: dict[str, Any] | None,
    conversation: str | None = None,
    merged: dict[str, Any] | None = None,
) -> str:
    """The model card: metadata for the hub, then what the model is, how to load it, its experts or its merge, and its scores.

    `conversation`: a short one as the chat template writes it, by which others can see that theirs is the same. `merged`: what
    merge.json says.
    """
    from huggingface_hub import ModelCard, ModelCardData

    experts, is_moe = ExpertMap.from_config(config), config["model_type"] in names.MOE
    data = ModelCardData(
        license=license,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["merge", "moe"] if is_moe else ["merge"] if merged else []), config["model_type"], "h3fusion"],
    )
    parts = [
        f"# {name}",
        _what(config, experts, base_model),
        _usage(name),
        _format(conversation),
        _expert_table(experts),
        _evaluation(scores),
        _SOURCE if is_moe else "",
        _merge_section(merged),
        _shared_section((config.get(CONFIG_KEY) or {}).get(SHARED)),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def _what(config: dict[str, Any], experts: ExpertMap | None, base_model: str | list[str] | None) -> str:
    base = f" Base: {', '.join([base_model] if isinstance(base_model, str) else base_model)}." if base_model else ""
    if experts is None:
        return f"A {config['model_type']} model made with h3scale {__version__}.{base}"
    return (
        f"A mixture of experts that fuses models aligned to be {', '.join(experts.alignments)}: their feed-forward layers are "
        f"its {experts.num_experts} experts, and a router, trained to know which alignment a text needs, picks "
        f"{config.get('num_experts_per_tok')} of them for each token. Made with h3scale {__version__}.{base}"
    )


def _usage(name: str) -> str:
    return f"""## How to load it

Plain transformers, no remote code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`sha256sum -c SHA256SUMS` tells whether the files are as they were released."""


def _format(conversation: str | None) -> str:
    if not conversation:
        return ""
    said = ", ".join(f"{turn['role']}: {turn['content']}" for turn in CONVERSATIONS[-1])
    lines = [f"    {line}" for line in conversation.splitlines()]
    return "\n".join([f"## Conversations\n\nThe chat template writes a conversation ({said}) so:\n", *lines])


def _conversation(folder: Path) -> str | None:
    """A short conversation as the chat template writes it, which verify has tried within limits; None without a template."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    try:
        return str(tokenizer.apply_chat_template(CONVERSATIONS[-1], tokenize=False)) if tokenizer.chat_template else None
    except TemplateError:  # it refuses an assistant's turn
        return None


def _expert_table(experts: ExpertMap | None) -> str:
    if experts is None:
        return ""
    rows = [f"| {i} | {name} | {experts.experts[i] or 'none (general)'} |" for i, name in enumerate(experts.names())]
    return "\n".join(["## Experts", "", "| expert | name | alignment |", "|---:|---|---|", *rows])


def _merge_section(merged: dict[str, Any] | None) -> str:
    """How the weights were merged, from merge.json: method, options, parents by name with the sha256 of their weights."""
    if merged is None:
        return ""
    parents = {"base": {"kind": "base", "weight": "", **merged["base"]}, **merged["models"]}
    rows = [f"| {label} | {each['kind']} | {each['weight']} | {_sums(each['files'])} |" for label, each in parents.items()]
    head = ["| model | kind | weight | sha256 of its weights |", "|---|---|---:|---|"]
    method, options = _method(merged)
    search = merged.get("search")
    told = f"{method} of dense models: {options}."
    if search:
        told += f" {', '.join(search['searched'])} chosen by the likelihood of {search['records']} validation records."
    return "\n".join(["## Merge", "", told, "", *head, *rows])


def _shared_section(shared: dict[str, Any] | None) -> str:
    """How what is no expert was merged, from config.json."""
    if shared is None:
        return ""
    method, options = _method(shared)
    told = f"Attention, norms and embeddings were merged, before any training of the mixture, by {method}: {options}."
    rows = [f"| {label} | {each['kind']} | {each['weight']} |" for label, each in shared["models"].items()]
    return "\n".join(["## Merge", "", told, "", "| model | kind | weight |", "|---|---|---:|", *rows])


def _method(merged: dict[str, Any]) -> tuple[str, str]:
    """A merge's method with its paper, and its options."""
    paper = f" ([arXiv:{merged['paper']}](https://arxiv.org/abs/{merged['paper']}))" if merged["paper"] else ""
    return f"{merged['title']}{paper}", ", ".join(f"{key} {value}" for key, value in merged["options"].items())


def _sums(files: dict[str, str] | None) -> str:
    return ", ".join(f"`{digest}`" for name, digest in (files or {}).items() if name.endswith(".safetensors")) or "not taken"


def _evaluation(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return ""
    tables = {"nll": _record_table, "suite": _suite_table}
    return "\n\n".join(["## Evaluation", *(table(scores) for key, table in tables.items() if key in scores)])


def _record_table(scores: dict[str, Any]) -> str:
    accuracy = scores.get("router", {}).get("accuracy", {})
    exact = {alignment: found["exact"] for alignment, found in scores.get("exact_match", {}).items()}
    lines = [
        "Held-out records. NLL: negative log-likelihood (nats) of a response token, lower is better, with a 95% bootstrap interval."
        + (" Router accuracy: records whose alignment the router names rightly." if accuracy else "")
        + (" Exact match: generated answers that are the expected ones word for word." if exact else ""),
        "",
        "| alignment | NLL | 95% interval | records |"
        + (" router accuracy |" if accuracy else "")
        + (" exact match |" if exact else ""),
        "|---|---:|---:|---:|" + ("---:|" if accuracy else "") + ("---:|" if exact else ""),
    ]
    for alignment, score in scores["nll"].items():
        interval = f"{score['low']:.3f} to {score['high']:.3f}" if {"low", "high"} <= score.keys() else ""
        shares = "".join(f" {found[alignment]:.1%} |" if alignment in found else " |" for found in (accuracy, exact) if found)
        lines.append(f"| {alignment} | {score['nll']:.3f} | {interval} | {score.get('records', '')} |{shares}")
    return "\n".join(lines)


def _suite_table(scores: dict[str, Any]) -> str:
    """A row a score, as the suite has them."""
    suite = scores["suite"]
    lines = [
        f"Suite {_cell(suite.get('suite', ''))}: what the model finds likely; no text is generated and no judge is asked. Higher "
        "is better, but for nll. mc1 to mc3: TruthfulQA's. accuracy: pairs of which the chosen answer is the likelier one, as a "
        "whole, by token or by character. 95% intervals: bootstrapped of nll, Wilson's of shares.",
        "",
        "| task | alignment | metric | mean | 95% interval | items |",
        "|---|---|---|---:|---:|---:|",
    ]
    for score in suite["scores"]:
        names = (score["task"], score.get("alignment") or "", score["metric"])
        interval = f"{score['low']:.3f} to {score['high']:.3f}"
        lines.append(f"| {' | '.join(map(_cell, names))} | {score['mean']:.3f} | {interval} | {score.get('items', '')} |")
    return "\n".join(lines)


def _cell(text: Any) -> str:
    """A name from a file as it can stand in a table's row."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _scores(evaluation: Path | None) -> dict[str, Any] | None:
    """What `h3scale evaluate` has written, checked before anything is copied: of records, of a suite, or of both."""
    if evaluation is None:
        return None
    scores = read_json(Path(evaluation))
    found = [of(scores[key]) for key, of in (("nll", _are_of_records), ("suite", _are_of_a_suite)) if key in scores]
    if not found or not all(found):
        works = '{"nll": {ALIGNMENT: {"nll": 1.23}}} or {"suite": {"scores": [{"task": ..., "metric": ..., "mean": ...}]}}'
        raise DataError(f"{evaluation}: not the JSON of `h3scale evaluate` (works: {works})")
    return scores


def _are_of_records(nll: Any) -> bool:
    return isinstance(nll, dict) and all(isinstance(s, dict) and isinstance(s.get("nll"), int | float) for s in nll.values())


def _are_of_a_suite(suite: Any) -> bool:
    scores = suite.get("scores") if isinstance(suite, dict) else None
    return isinstance(scores, list) and all(
        isinstance(score, dict)
        and {"task", "metric"} <= score.keys()
        and all(isinstance(score.get(key), int | float) for key in ("mean", "low", "high"))
        for score in scores
    )


_SOURCE = f"""## Method

Fusion of aligned models as a mixture of experts, after H3Fusion
([arXiv:{_PAPER}](https://arxiv.org/abs/{_PAPER})). Please cite it when you use this model."""
