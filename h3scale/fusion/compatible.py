"""Can these models become one? Findings that stop it, and warnings that a person should read first.

Nothing is written here. Findings of equal form in many layers are one line.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.shards import TOKENIZER_FILES, ModelFolder, read_json
from h3scale.checkpoint.vocabulary import has_same_ids, known_ids
from h3scale.errors import DataError
from h3scale.fusion.sources import AdapterSource, DenseSource, Source
from h3scale.model.names import DENSE_FFN

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.*)")

# Settings that change what equal weights compute. Fusion takes the base's, so an aligned model with others would be
# another function inside the fused model than outside it.
_MEANING = (
    "hidden_act",
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
)

# Old checkpoints store this buffer; transformers computes it from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def fold(names: Iterable[str]) -> dict[str, str]:
    """Names that differ in the layer only, as {"model.layers.*.up": "0-31"}; "" for a name without a layer."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        pattern = f"{found[1]}.*.{found[3]}" if found else name
        layers.setdefault(pattern, []).extend([int(found[2])] if found else [])
    return {pattern: ranges(numbers) for pattern, numbers in layers.items()}


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _folded(names: Iterable[str]) -> list[str]:
    return [f"{pattern} (layers {layers})" if layers else pattern for pattern, layers in fold(names).items()]


def full_config(folder: ModelFolder) -> Any:
    """The transformers config with every default of its own family filled in (never the fused family's).

    A config.json may leave out what equals its family's default, and the defaults of Llama and Mixtral differ
    (rope_theta, num_key_value_heads, rms_norm_eps).
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes for a config that it cannot read
        raise DataError(f"{folder.path}/config.json: {str(error).strip().splitlines()[0]}") from None


def expected_shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of all weights that a model of this config has, and which of them are tied to another one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", {})) if config.tie_word_embeddings else set()
    return shapes, tied


def check_fit(
    base: DenseSource,
    models: Mapping[str, Source],
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    tied: set[str],
    same_dtype: bool = False,
) -> None:
    """DataError (65) with all that stops the models from becoming one; their number formats too if they are to be the same."""
    findings = shape_findings(base, shapes, tied)
    for source in models.values():
        if isinstance(source, DenseSource):
            if source.folder.config != base.folder.config:  # else the same defaults are filled in
                findings += config_findings(source, config)
            findings += shape_findings(source, shapes, tied)
            findings += dtype_findings(source, base) if same_dtype else []
    findings += tokenizer_findings(base.path, [source.path for source in models.values()])
    if findings:
        raise DataError(list(dict.fromkeys(findings)))


def shape_findings(source: Source, shapes: Mapping[str, tuple[int, ...]], tied: set[str]) -> list[str]:
    """Tensors that are missing, unknown, of another shape than `shapes` says, or not floating point."""
    specs = {name: spec for name, spec in source.specs.items() if not name.endswith(_IGNORED_SUFFIX)}
    findings = [f"{source.path}: misses {row}" for row in _folded(n for n in shapes if n not in specs and n not in tied)]
    findings += [f"{source.path}: does not know what to do with {row}" for row in _folded(n for n in specs if n not in shapes)]
    common = [name for name in specs if name in shapes]
    wrong: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in common:
        if specs[name].shape != shapes[name]:
            wrong.setdefault((specs[name].shape, shapes[name]), []).append(name)
    for (found, wanted), names in wrong.items():
        findings += [f"{source.path}: {row} has shape {found}, the base has {wanted}" for row in _folded(names)]
    unusable = [name for name in common if not specs[name].dtype.is_floating_point]
    findings += [f"{source.path}: {row} is not floating point (works: models that are not quantised)" for row in _folded(unusable)]
    return findings


def dtype_findings(source: Source, base: Source) -> list[str]:
    """Tensors in another number format than the base's: a mean of both has none of its own."""
    found: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, spec in source.specs.items():
        wanted = base.specs.get(name)
        if wanted is not None and wanted.dtype != spec.dtype:
            found.setdefault((spec.dtype, wanted.dtype), []).append(name)
    return [
        f"{source.path}: {row} is {str(own).removeprefix('torch.')}, the base's is {str(wanted).removeprefix('torch.')} "
        "(works: dtype, which says what to write)"
        for (own, wanted), names in found.items()
        for row in _folded(names)
    ]


def config_findings(source: DenseSource, base_config: Any) -> list[str]:
    """Settings of an aligned model that the fused model, which has the base's, could not honour."""
    config = full_config(source.folder)
    if config.model_type != base_config.model_type:
        return [f"{source.path}: model_type '{config.model_type}', the base is '{base_config.model_type}'"]
    pairs = {key: (getattr(config, key, None), getattr(base_config, key, None)) for key in _MEANING}
    return [f"{source.path}: {key} is {own}, the base has {wanted}" for key, (own, wanted) in pairs.items() if own != wanted]


def tokenizer_findings(base: Path, models: Iterable[Path]) -> list[str]:
    """Models whose tokenizer gives other ids than the base's, or than the first model's that has one. Others use that one."""
    first: dict[str, tuple[Path, dict[str, int]]] = {}
    findings = []
    for path in (base, *models):
        if any(has_same_ids(path, known) for known, _ in first.values()) or (ids := known_ids(path)) is None:
            continue
        known, wanted = first.setdefault(ids.kind, (path, ids.of_token))
        own = ids.of_token
        differing = sorted({token for token in wanted.keys() | own.keys() if wanted.get(token) != own.get(token)})
        if differing:
            shown = ", ".join(map(repr, differing[:3]))
            whose = "the base" if known == base else str(known)
            findings.append(f"{path}: tokenizer differs from {whose}'s in {len(differing)} tokens (such as {shown})")
    return findings


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in the folder knows how a conversation is written."""
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def tokenizer_folder(folders: Sequence[Path]) -> Path | None:
    """The folder whose tokenizer is copied: the first, the base's, unless only an aligned model has learned to converse."""
    found = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    return next((folder for folder in found if has_chat_template(folder)), found[0] if found else None)


def shared_warnings(models: Mapping[str, Source], shared_names: list[str]) -> list[str]:
    """Aligned models whose attention, norms or embeddings are not the base's, which `shared: base` leaves out."""
    warnings = []
    for label, source in models.items():
        changed = source.changed(shared_names)
        if changed:
            warnings.append(
                f"{label}: {len(changed)} of {len(shared_names)} shared tensors (attention, norms, embeddings) are not the base's "
                f"and are left out: the expert alone will not equal {source.path} (shared: average blends them)"
            )
    return warnings


def equal_warnings(base: Source, models: Mapping[str, Source], ffn_names: list[str]) -> list[str]:
    """Sources whose FFNs are equal in every value: their experts would be copies that no router can tell apart."""
    groups: list[list[Source]] = []
    for source in [base, *models.values()]:
        for group in groups:
            if all(torch.equal(source.tensor(name), group[0].tensor(name)) for name in ffn_names):
                group.append(source)
                break
        else:
            groups.append([source])
    if len(groups) == 1:
        return ["the FFNs of all sources are equal: every expert will be the same, and the router cannot matter"]
    return [f"{' and '.join(s.label for s in group)}: the FFNs are equal" for group in groups if len(group) > 1]


def base_warnings(models: Mapping[str, Source]) -> list[str]:
    """Adapters that name another base than the recipe's."""
    named = {label: source.other_base() for label, source in models.items() if isinstance(source, AdapterSource)}
    return [f"{label}: the adapter says it was made for '{other}'" for label, other in named.items() if other]


def ffn_names(num_layers: int) -> list[str]:
    """The dense FFN's tensors of all layers."""
    return [template.format(layer=layer) for layer in range(num_layers) for template in DENSE_FFN.values()]
