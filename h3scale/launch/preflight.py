"""Before the ranks: one task a node looks whether they can run at all: `python -m h3scale.launch.preflight RECIPE [key=value ...]`.

Same versions and recipe on all nodes (78), a shared folder with room for what the run leaves (73), nodes that reach each other,
enough GPUs and a collective that works (69; GPUs 78). Each finding is one line that begins with the node.
"""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from h3scale.config.base import load_recipe
from h3scale.config.deepspeed import read_deepspeed
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError, H3Error, OutputError, PeerLostError
from h3scale.launch.rendezvous import LIMIT_S, Meeting, meet
from h3scale.versions import versions

SEEN_S = 10.0  # by which a new file is seen on the other nodes of a shared file system
COLLECTIVE_S = 2 * LIMIT_S  # with the import of torch on all nodes


def check(words: Sequence[str], meeting: Meeting, tasks: int) -> None:
    """Raises the finding of all nodes, on node 0 with its lines, on the others with none: one node speaks.

    `tasks`: ranks a node.
    """
    facts, mark = look(words, meeting)
    try:
        verdict = meet(meeting, facts, lambda told: judge(meeting.nodes, told))
    finally:
        if mark is not None and meeting.index == 0:
            mark.unlink(missing_ok=True)
    if verdict["code"]:
        error = H3Error(verdict["findings"] if meeting.index == 0 else [])
        error.exit_code = verdict["code"]
        raise error
    _collective(meeting, tasks)


def look(words: Sequence[str], meeting: Meeting) -> tuple[dict[str, Any], Path | None]:
    """What this node sees, and the file of node 0 that all shall see. A recipe with a mistake is a fact as well."""
    facts: dict[str, Any] = {"versions": versions()}
    try:
        recipe = load_recipe(TrainRecipe, words[0], list(words[1:]))
        values = recipe.model_dump(mode="json")
        facts["recipe"] = values | {"deepspeed": {recipe.deepspeed: read_deepspeed(recipe.deepspeed)}}
        mark = Path(recipe.out).absolute().parent / f".preflight-{meeting.key}"
        facts |= _place(recipe, mark, meeting.index == 0)
    except H3Error as error:
        return facts | {"error": error.findings, "code": error.exit_code}, None
    return facts, mark


def judge(nodes: Sequence[str], told: list[dict[str, Any]]) -> dict[str, Any]:
    """The findings of all nodes, and the exit code of the first of them (0 without any)."""
    found = [*_errors(nodes, told), *_differences(nodes, told), *_places(nodes, told)]
    return {"code": found[0][0] if found else 0, "findings": [line for _, line in found]}


Findings = Iterator[tuple[int, str]]


def _errors(nodes: Sequence[str], told: list[dict[str, Any]]) -> Findings:
    """Of recipes; what every node says is said once."""
    if all(facts.get("error") == told[0].get("error") for facts in told):
        yield from ((told[0]["code"], line) for line in told[0].get("error", []))
        return
    for name, facts in zip(nodes, told, strict=True):
        yield from ((facts["code"], f"{name}: {line}") for line in facts.get("error", []))


def _differences(nodes: Sequence[str], told: list[dict[str, Any]]) -> Findings:
    for what, works in (("versions", "the same environment on all nodes"), ("recipe", "the same files on all nodes")):
        first = _flat(told[0].get(what, {}))
        for name, facts in zip(nodes[1:], told[1:], strict=True):
            other = _flat(facts.get(what, {}))
            keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            if first and other and keys:
                shown = ", ".join(f"{key} is {other.get(key)}, on {nodes[0]} {first.get(key)}" for key in keys[:3])
                yield ConfigError.exit_code, f"{name}: {what}: {shown} (works: {works})"


def _places(nodes: Sequence[str], told: list[dict[str, Any]]) -> Findings:
    for name, facts in zip(nodes, told, strict=True):
        if "place" not in facts:
            continue
        place, free, needed = facts["place"], facts["free"], facts["needed"]
        if facts["key"] != told[0].get("key"):
            yield OutputError.exit_code, f"{name}: {place}: is not the folder that {nodes[0]} writes (works: a shared file system)"
        elif not facts["writable"]:
            yield OutputError.exit_code, f"{name}: {place}: is not writable"
        elif free < needed:
            yield (
                OutputError.exit_code,
                f"{name}: {place}: {free / 1e9:.1f} GB free, the model alone is {needed / 1e9:.1f} GB (works: another out)",
            )


def _place(recipe: TrainRecipe, mark: Path, first: bool) -> dict[str, Any]:
    """What there is of the folder that the run writes to. The first node makes it, and leaves the mark for the others."""
    folder = mark.parent
    key = _written(mark) if first else _seen(mark)
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
    weights = Path(recipe.model).glob("*.safetensors") if recipe.model else []
    needed = sum(path.stat().st_size for path in weights)
    return {"place": str(folder), "key": key, "free": free, "writable": writable, "needed": needed}


def _written(mark: Path) -> str:
    key = uuid.uuid4().hex
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(key, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{mark.parent}: cannot be written ({error.strerror})") from None
    return key


def _seen(mark: Path) -> str | None:
    deadline = time.monotonic() + SEEN_S
    while time.monotonic() < deadline:
        try:
            return mark.read_text(encoding="utf-8")
        except OSError:
            time.sleep(0.2)
    return None


def _collective(meeting: Meeting, tasks: int) -> None:
    """torch counts the GPUs and adds a number over the nodes, in a process of its own: this one stays free of it."""
    own = meeting.nodes[meeting.index]
    command = [sys.executable, "-m", "h3scale.launch.collective", str(meeting.index), str(tasks), *meeting.nodes]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COLLECTIVE_S)
    except subprocess.TimeoutExpired:
        raise PeerLostError(f"{own}: a collective of all nodes does not end within {COLLECTIVE_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        error = H3Error([line.removeprefix("error: ") for line in lines] or [f"{own}: {_last(done.stderr)}"])
        killed_or_ours = PeerLostError.exit_code if done.returncode < 0 else H3Error.exit_code
        error.exit_code = done.returncode if lines else killed_or_ours
        raise error


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "torch ended without a word"


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: str(value)}
    return flat


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Exit code of the node; its findings on stderr."""
    words = [word for word in arguments if not word.startswith("--")]
    meeting = Meeting(
        nodes=tuple(environment["H3SCALE_NODES"].split()),
        index=int(environment["SLURM_PROCID"]),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        key=f"{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT') or 0}",
    )
    try:
        check(words, meeting, int(environment["H3SCALE_TASKS_PER_NODE"]))
    except H3Error as error:
        for finding in error.findings:
            print(f"error: preflight: {finding}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
