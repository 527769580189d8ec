"""Is a model folder what it says, and is it the model that was trained? Everything wrong is found in one go."""

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from h3scale.checkpoint.consolidate import SUMS
from h3scale.checkpoint.expected import differences, expected_shapes, stored_as
from h3scale.checkpoint.extents import Weights
from h3scale.checkpoint.lora import open_weights
from h3scale.checkpoint.receipt import RECEIPT, check_receipt, sha256
from h3scale.checkpoint.shards import GENERATION, TOKENIZER_FILES, ModelFolder, read_json
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint, find_checkpoint
from h3scale.errors import DataError, H3Error, UnsafeError
from h3scale.log import progress
from h3scale.model import names
from h3scale.model.experts import CONFIG_KEY, ExpertMap

LOGIT_TOLERANCE = 1e-5  # between fp32 logits of engine and plain transformers; or, where larger, LOGIT_ROUNDING of the largest
LOGIT_ROUNDING = 1e-6  # eight units in the last place of fp32
_LISTED = 4  # layers that are written out
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Report:
    """What was looked at. `findings` are wrong; `warnings` may be meant. `None`: was not there to be checked."""

    model: str
    num_tensors: int = 0
    num_parameters: int = 0
    dtypes: list[str] = field(default_factory=list)
    num_sums: int | None = None
    num_proven_tensors: int | None = None
    num_equal_tensors: int | None = None
    max_abs_difference: float | None = None
    logit_limit: float | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(model_folder: str | Path, against: str | Path | None = None, *, hashes: bool = True) -> Report:
    """Checks names, shapes, values, tokenizer, and SHA256SUMS or receipt of a Hugging Face folder.

    `against`, a training checkpoint: also its own hashes (unless `hashes` is off: they read all of it), every tensor bit
    for bit, and the logits that plain transformers gives on the checkpoint's probe, within LOGIT_TOLERANCE (training in fp32).
    Raises DataError (65) with all findings, MissingInputError (66) when a folder is not there.
    """
    folder = ModelFolder(model_folder)
    report = Report(str(model_folder))
    checkpoint = find_checkpoint(against) if against is not None else None
    checks = [_check_sums, _check_receipt, _check_names, _check_values, _check_tokenizer, _check_remote_code]
    for check in checks:
        _collect(report, lambda check=check: check(folder, report))
    if checkpoint is not None:
        _check_against(folder, checkpoint, report, hashes)
    if report.findings:
        raise DataError(report.findings)
    return report


def _collect(report: Report, check: Any) -> None:
    """Runs a check; what it raises for people becomes findings, so that the other checks still run."""
    try:
        check()
    except UnsafeError:
        raise
    except H3Error as error:
        report.findings += [finding for finding in error.findings if finding not in report.findings]


def _check_against(folder: ModelFolder, checkpoint: TrainingCheckpoint, report: Report, hashes: bool) -> None:
    if hashes:
        _collect(report, lambda: report.findings.extend(checkpoint.check_hashes()))
    _collect(report, lambda: _check_settings(folder, checkpoint, report))
    if not report.findings:  # else the weights cannot be compared one by one
        _collect(report, lambda: _check_trained(folder, checkpoint, report))


def _check_sums(folder: ModelFolder, report: Report) -> None:
    path = folder.path / SUMS
    if not path.is_file():
        return
    listed = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        file = folder.path / name
        if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            report.findings.append(f"{path}:{number}: not a line of sha256sum: '{line[:80]}'")
        elif not file.is_file():
            report.findings.append(f"{file}: in {SUMS}, but missing")
        elif sha256(file) != digest:
            report.findings.append(f"{file}: sha256 differs from {SUMS}: the file has changed since it was written")
        listed.add(name)
    report.warnings += _unknown(folder, listed, SUMS)
    report.num_sums = len(listed)


def _check_receipt(folder: ModelFolder, report: Report) -> None:
    path = folder.path / RECEIPT
    if not path.is_file():
        return
    report.num_proven_tensors, findings = check_receipt(path, folder.path)
    report.findings += findings
    report.warnings += _unknown(folder, set(read_json(path)["files"]), RECEIPT)


def _unknown(folder: ModelFolder, listed: set[str], where: str) -> list[str]:
    present = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file()} - {SUMS, RECEIPT}
    return [f"{folder.path / name}: is not in {where}" for name in sorted(present - listed)]


def _check_names(folder: ModelFolder, report: Report) -> None:
    found = {name: spec.shape for name, spec in folder.specs.items()}
    report.num_tensors = len(found)
    report.num_parameters = sum(spec.num_bytes // spec.dtype.itemsize for spec in folder.specs.values())
    report.dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in folder.specs.values()})
    report.findings += differences(found, expected_shapes(folder.config, folder.path), folder.path)


def _check_values(folder: ModelFolder, report: Report) -> None:
    """No NaN or infinity; no two experts of a layer with the same weights (then the router's choice means nothing)."""
    moe = names.MOE.get(folder.config.get("model_type", ""))
    prints: dict[tuple[int, int], dict[str, bytes]] = {}
    with progress("verify", len(folder.files), "tensors") as bar:
        for name in folder.files:
            values = folder.tensor(name)
            if values.is_floating_point() and not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                report.findings.append(f"{folder.path}: {name} has {bad} values that are NaN or infinite")
            for projection, template in (moe.hub_experts if moe else {}).items():
                found = names.match(template, name)
                if found is not None:
                    prints.setdefault((found["layer"], found["expert"]), {})[projection] = _fingerprint(values)
            bar.advance()
    report.warnings += _twins(folder, prints)


def _twins(folder: ModelFolder, prints: dict[tuple[int, int], dict[str, bytes]]) -> list[str]:
    """A line for each pair of experts with equal weights, `prints` being what each (layer, expert) holds."""
    first: dict[tuple[int, tuple[tuple[str, bytes], ...]], int] = {}
    pairs: dict[tuple[int, int], list[int]] = {}
    for (layer, expert), parts in sorted(prints.items()):
        twin = first.setdefault((layer, tuple(sorted(parts.items()))), expert)
        if twin != expert:
            pairs.setdefault((twin, expert), []).append(layer)
    expert_map = ExpertMap.from_config(folder.config)
    of = expert_map.experts if expert_map else ()
    lines = []
    for (one, other), layers in pairs.items():
        copies = " (copies of one FFN, which training parts)" if of and of[one] == of[other] else ""
        where = ", ".join(map(str, layers[:_LISTED])) + (", ..." if len(layers) > _LISTED else "")
        where = f"layer{'s' if len(layers) > 1 else ''} {where}"
        lines.append(f"{folder.path}: experts {one} and {other} have identical weights in {where}{copies}")
    return lines


def _fingerprint(values: torch.Tensor) -> bytes:
    return hashlib.blake2b(values.contiguous().view(torch.uint8).numpy().data, digest_size=16).digest()


def _check_tokenizer(folder: ModelFolder, report: Report) -> None:
    path, vocab_size = folder.path, folder.config.get("vocab_size", 0)
    generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    for file, values in (("config.json", folder.config), (GENERATION, generation)):
        for key in _SPECIAL_IDS:
            ids = values.get(key)
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is not None and not 0 <= token_id < vocab_size:
                    report.findings.append(f"{path / file}: {key}: {token_id} is outside the vocabulary of {vocab_size}")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        report.warnings.append(f"{path}: has no tokenizer")
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a broken tokenizer, and each is the finding
        raise DataError(f"{path}: transformers cannot load the tokenizer ({str(error).splitlines()[0][:200]})") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if max(len(tokenizer), largest + 1) > vocab_size:
        report.findings.append(
            f"{path}: the tokenizer has {len(tokenizer)} tokens (largest id {largest}), the model {vocab_size} rows (vocab_size)"
        )
    ends = folder.config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and ends != [None] and tokenizer.eos_token_id not in ends:
        report.warnings.append(f"{path}: the tokenizer ends a text with {tokenizer.eos_token_id}, config.json says {ends}")


def _check_remote_code(folder: ModelFolder, report: Report) -> None:
    if "auto_map" in folder.config:
        report.warnings.append(
            f"{folder.path}/config.json: auto_map asks loaders to run code (h3scale checkpoint release drops it)"
        )


def _check_settings(folder: ModelFolder, checkpoint: TrainingCheckpoint, report: Report) -> None:
    """The order of the experts and the tokenizer are those of the training."""
    ours, theirs = folder.config.get(CONFIG_KEY), checkpoint.config.get(CONFIG_KEY)
    if ours != theirs:
        report.findings.append(f"{folder.path}/config.json: {CONFIG_KEY}: {ours}, the checkpoint was trained with {theirs}")
    for name in TOKENIZER_FILES:
        trained, here = checkpoint.model / name, folder.path / name
        if trained.is_file() and (not here.is_file() or sha256(here) != sha256(trained)):
            report.findings.append(f"{here}: is not the file that the model was trained with ({trained})")


def _check_trained(folder: ModelFolder, checkpoint: TrainingCheckpoint, report: Report) -> None:
    weights = open_weights(checkpoint.deepspeed, checkpoint.model)
    _check_weights(folder, checkpoint, weights, report)
    _check_probe(folder, checkpoint, report, exact=report.dtypes == ["float32"] and not weights.is_rounded)


def _check_weights(folder: ModelFolder, checkpoint: TrainingCheckpoint, weights: Weights, report: Report) -> None:
    """Every tensor bit for bit what the checkpoint holds, rounded to the folder's format; a second reader, no logits."""
    equal, other = 0, []
    for name in folder.files:
        stored, expert = stored_as(name, folder.config.get("model_type"))
        values = folder.tensor(name)
        trained = weights.tensor(stored) if expert is None else weights.expert(stored, expert)
        if torch.equal(values, trained.to(values.dtype)):
            equal += 1
        else:
            other.append(f"{folder.path}: {name} is not what {checkpoint.path} holds")
    report.num_equal_tensors = equal
    report.findings += other


def _check_probe(folder: ModelFolder, checkpoint: TrainingCheckpoint, report: Report, exact: bool) -> None:
    """Logits of plain transformers against the engine's; a limit where both computed in fp32 (`exact`), else told only."""
    if checkpoint.probe is None:
        report.warnings.append(f"{checkpoint.path}: has no probe.safetensors, so the logits were not compared")
        return
    probe = load_file(checkpoint.probe)
    logits = transformers_logits(folder.path, probe["input_ids"], probe["position_ids"])
    if logits.shape != probe["logits"].shape:
        raise DataError(f"{folder.path}: logits {tuple(logits.shape)}, the trained engine gave {tuple(probe['logits'].shape)}")
    difference = float((logits - probe["logits"]).abs().max())
    limit = max(LOGIT_TOLERANCE, LOGIT_ROUNDING * float(probe["logits"].abs().max()))
    report.max_abs_difference, report.logit_limit = difference, limit
    if difference < limit:  # never of an infinite logit
        return
    text = f"{folder.path}: logits differ from the trained engine's by {difference:.2e} (limit {limit:.1e})"
    if exact or math.isnan(difference):
        report.findings.append(text)
    else:
        report.warnings.append(f"{text}: expected, since training or these weights are not fp32; look at the weights instead")


def transformers_logits(folder: Path, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, S, V) in fp32 of a model folder, loaded as anyone would load it; DataError when it does not load whole."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0][:200]})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    lost = {key: value for key, value in info.items() if value}
    if lost:
        raise DataError(f"{folder}: transformers did not load it whole: {lost}")
    try:
        with torch.no_grad():
            return model.eval()(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
    except RuntimeError as error:
        raise DataError(f"{folder}: transformers loads it, but cannot run it ({str(error).splitlines()[0][:200]})") from error
