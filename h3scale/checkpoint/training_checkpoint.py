"""Training checkpoints on disk: found, and their files as their manifest says.

One is `checkpoints/NAME/step-000120/` with `deepspeed/` (DeepSpeed's tag folder), `model/` (config, tokenizer),
`probe.safetensors` (an input and the engine's logits on it) and `manifest.json` (sizes and sha256).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from h3scale.checkpoint.inside import is_plain, leads_outside
from h3scale.checkpoint.manifest import MANIFEST, read_manifest
from h3scale.checkpoint.receipt import sha256
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.tag_folder import UNIVERSAL
from h3scale.errors import DataError, MissingInputError, UnsafeError

PROBE = "probe.safetensors"
MODEL = "model"  # the folder with config and tokenizer
LATEST = "latest"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One step of a run, found on disk. A bare DeepSpeed tag folder has no manifest and no probe."""

    path: Path
    deepspeed: Path
    model: Path
    manifest: dict[str, Any] | None

    @property
    def probe(self) -> Path | None:
        path = self.path / PROBE
        return path if self.manifest is not None and path.is_file() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.model / "config.json")

    def check_sizes(self) -> None:
        """DataError (65) naming files of the manifest that are missing or have another size, and a rank's that is not in it."""
        findings = []
        for name, entry in self._listed():
            path = self.path / name
            if not path.is_file():
                findings.append(f"{path}: in {MANIFEST}, but missing")
            elif path.stat().st_size != entry["size"]:
                findings.append(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}")
        listed = {self.path / name for name, _ in self._listed()}
        for path in sorted(self.deepspeed.glob("*_states.pt")) if self.manifest is not None else ():
            if path not in listed:  # of another run: read with the others it would be taken for one of its ranks
                findings.append(f"{path}: not in {MANIFEST}")
        if findings:
            raise DataError(findings)

    def check_hashes(self, part: int = 0, parts: int = 1) -> list[str]:
        """A finding for each file of the manifest whose sha256 is another one; reads everything (about 1 GB/s).

        Every `parts`-th file from `part` on, for several processes that share the work.
        """
        self.check_sizes()
        return [
            f"{self.path / name}: sha256 differs from {MANIFEST}: the file has changed since it was saved"
            for name, entry in self._listed()[part::parts]
            if sha256(self.path / name) != entry["sha256"]
        ]

    def _listed(self) -> list[tuple[str, dict[str, Any]]]:
        files = (self.manifest or {}).get("files", {})
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UnsafeError(f"{self.path / MANIFEST}: names '{name}', outside the checkpoint")
        return sorted(files.items())


def find_checkpoint(source: str | Path, config_from: str | Path | None = None) -> TrainingCheckpoint:
    """The checkpoint that `source` names: a step folder, a run folder, a DeepSpeed tag folder, or the folder around it.

    Of a run's steps it is the one that its manifest calls the best (evaluation.keep_best), else the newest; of DeepSpeed's
    tags the one that `latest` names.

    A tag folder needs `config_from`, a folder with config.json. Raises MissingInputError (66) with what would work.
    """
    path = Path(source)
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such checkpoint folder")
    if not (path / MANIFEST).is_file():
        steps = steps_of(path)
        if steps:
            best = [p for p in steps if read_manifest(p).get("best")]
            path = (best or steps)[-1]
        else:
            path = latest_tag(path)
    if (path / MANIFEST).is_file():
        model = Path(config_from) if config_from else path / MODEL
        return TrainingCheckpoint(path, path / "deepspeed", model, read_manifest(path))
    if any(path.glob("*_states.pt")) or (path / UNIVERSAL).is_dir():
        if config_from is None:
            raise MissingInputError(f"{path}: a bare DeepSpeed folder has no config.json (works: --config-from MODEL_FOLDER)")
        return TrainingCheckpoint(path, path, Path(config_from), None)
    raise MissingInputError(
        f"{path}: no checkpoint (works: a folder with {MANIFEST}, a run folder with step-* in it, a tag folder)"
    )


def steps_of(run: Path) -> list[Path]:
    """The steps of a run, in their order."""
    steps = [path for path in run.iterdir() if re.fullmatch(r"step-\d+", path.name) and (path / MANIFEST).is_file()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def latest_tag(folder: Path) -> Path:
    """The tag folder that DeepSpeed's file `latest` names; the folder itself where there is no such file."""
    file = folder / LATEST
    if not file.is_file():
        return folder
    tag = file.read_text(encoding="utf-8").strip()
    if not is_plain(tag) or leads_outside(folder, folder / tag):
        raise UnsafeError(f"{file}: names '{tag}', which is no folder beside it")
    return folder / tag
