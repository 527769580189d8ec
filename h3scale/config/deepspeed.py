"""DeepSpeed's JSON: read, checked (DeepSpeed itself accepts typos in silence) and completed from the recipe."""

import json
from typing import Any

from h3scale.config.base import checked, find
from h3scale.config.deepspeed_keys import OWNED, SET_HERE, UNSUPPORTED, UNSUPPORTED_VALUES, DeepSpeedFile
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError
from h3scale.topology import Topology, best_ep_size, divisors


def read_deepspeed(path: str) -> dict[str, Any]:
    """The JSON of a ds_config; ConfigError (78) with all findings: keys that are owned, unsupported or unknown, types, "auto"."""
    file = find(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    findings: list[str] = []
    rest = _refused(path, values, "", findings)
    try:
        checked(DeepSpeedFile, rest, path)
    except ConfigError as error:
        findings += error.findings
    if findings:
        raise ConfigError(findings)
    return values


def _refused(path: str, values: dict[str, Any], section: str, findings: list[str]) -> dict[str, Any]:
    """The values without those that a word can be said about; the words go to `findings`."""
    rest: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{section}{key}"
        word = _word(place, value)
        if word:
            findings.append(f"{path}: {place}: {word}")
        else:
            rest[key] = _refused(path, value, f"{place}.", findings) if isinstance(value, dict) else value
    return rest


def _word(place: str, value: Any) -> str:
    """Why a key of DeepSpeed's, or its value, is refused; nothing where that is up to its type."""
    if place in OWNED:
        return f"the recipe owns this (set {OWNED[place]} there)"
    if place in SET_HERE:
        return f"h3scale sets this ({SET_HERE[place]})"
    if place in UNSUPPORTED:
        return f"not supported here: {UNSUPPORTED[place]}"
    if isinstance(value, str) and (place, value) in UNSUPPORTED_VALUES:
        return f"{value!r} is not supported here: {UNSUPPORTED_VALUES[place, value]}"
    # The Trainer of transformers fills this in, DeepSpeed itself turns it into anything.
    return "'auto' is no value here (write one, or leave the key out)" if value == "auto" else ""


def complete(
    values: dict[str, Any],
    recipe: TrainRecipe,
    where: str,
    world_size: int,
    moe: tuple[str, int] | None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """The dict for deepspeed.initialize. `moe`: (AutoEP preset, number of experts), or None for a dense model.

    `ranks_per_node` is what `ep_size: best` goes by; all ranks when it is not given.

    Raises ConfigError (78) when the ranks do not divide the batch, or ep_size does not divide ranks and experts.
    """
    rows, micro = recipe.data.rows_per_batch, recipe.rows_per_micro_batch
    findings = []
    if rows % (micro * world_size):
        works = [str(d) for d in divisors(rows) if rows % (d * world_size) == 0]
        findings.append(
            f"{where}: rows_per_micro_batch: {micro} x {world_size} ranks does not divide data.rows_per_batch = {rows} "
            f"(works: {', '.join(works) or f'no value; use a number of ranks that divides {rows}'})"
        )
    ep_size = recipe.ep_size if recipe.ep_size != "best" else best_ep_size(moe[1] if moe else 1, ranks_per_node or world_size)
    if moe:
        try:
            Topology(world_size, ep_size, moe[1])
        except ConfigError as error:
            findings += [f"{where}: {finding}" for finding in error.findings]
    elif ep_size != 1:
        findings.append(f"{where}: ep_size: {recipe.ep_size}, but the model is dense and has no experts (works: 1)")
    if findings:
        raise ConfigError(findings)
    config = dict(values)
    config.update(
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=rows // (micro * world_size),
        gradient_clipping=recipe.optimizer.clip_norm,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # torch's takes its place where there is no GPU
    )
    if moe:
        # Experts get a forward that is not DeepSpeed's (train.expert_compute): it must not look for kernels that nobody will use.
        chosen = {"enabled": True, "autoep_size": ep_size, "preset_model": moe[0], "use_grouped_mm": False}
        config["expert_parallel"] = {**values.get("expert_parallel", {}), **chosen}
    else:
        config.pop("expert_parallel", None)
    return config
