"""Chat templates are programs that come with a model: they are tried in a process of its own, with limits."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from h3scale.checkpoint.checks import render
from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, Severity, error, unsafe
from h3scale.checkpoint.shards import read_json

_WALL_S = 120  # a machine can be busy; the limit that counts is of processor time (render.CPU_S)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_VERDICTS = {
    render.SYNTAX: (Severity.error, "is no template ({})"),
    render.FAILED: (Severity.error, "cannot write a conversation of a user alone ({})"),
    render.EMPTY: (Severity.error, "writes nothing for a conversation"),
    render.FORBIDDEN: (Severity.unsafe, "wants what the sandbox forbids ({})"),
    render.TOO_LONG: (Severity.unsafe, "writes {} characters for a conversation of two words"),
    render.TOO_LARGE: (Severity.unsafe, "needs more than {} MiB of memory"),
}


def check_chat_templates(subject: Subject) -> Iterator[Finding]:
    """Each template writes a short conversation, within limits of time, memory and length."""
    settings_file = subject.model / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    names = {key: _text(settings[key]) for key in _SPECIAL if settings.get(key)}
    for where, template in _templates(subject.model, settings):
        if not isinstance(template, str):
            yield error(f"{where}: chat_template: expected text, found {type(template).__name__}")
            continue
        finding = _try(where, template, names)
        if finding is not None:
            yield finding


def _templates(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where each template is, and its text."""
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            yield str(path), path.read_text(encoding="utf-8", errors="replace")
    path = folder / "chat_template.json"
    old = read_json(path).get("chat_template") if path.is_file() else None
    for file, found in ((path, old), (folder / "tokenizer_config.json", settings.get("chat_template"))):
        if isinstance(found, list):
            for entry in found:
                named = entry if isinstance(entry, dict) else {"template": entry}
                yield f"{file}: chat_template {named.get('name')}", named.get("template")
        elif found is not None:
            yield f"{file}: chat_template", found


def _try(where: str, template: str, names: dict[str, str]) -> Finding | None:
    question = json.dumps({"template": template, "names": names})
    command = [sys.executable, "-m", render.__name__]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_WALL_S, check=False)
    except subprocess.TimeoutExpired:
        return unsafe(f"{where}: has not written a conversation of two words within {_WALL_S} s")
    verdict, _, detail = done.stdout.partition("\n")
    if verdict == render.GOOD:
        return None
    if verdict in _VERDICTS:
        severity, words = _VERDICTS[verdict]
        return Finding(severity, f"{where}: {words.format(detail.strip()[:200])}")
    if done.returncode < 0:  # the kernel ended it
        return unsafe(f"{where}: has not written a conversation of two words within {render.CPU_S} s of processor time")
    raise RuntimeError(f"{where}: {' '.join(command)}: {done.stderr[-2000:]}")


def _text(token: Any) -> str:
    """A special token as tokenizer_config.json has it: text, or an object with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
