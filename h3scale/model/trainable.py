"""What is trained and what is frozen, by group names that mean the same in dense and mixture-of-experts models."""

import re
from collections.abc import Mapping, Sequence
from math import prod

from torch import nn

from h3scale.errors import ConfigError

# By the name of a parameter in transformers' modules. The first group that matches has the parameter.
GROUPS = {
    "lora": r"\.lora_[AB]\.",
    "router": r"\.mlp\.gate\.",
    "experts": r"\.mlp\.experts\.",
    "ffn": r"\.mlp\.",
    "attention": r"\.self_attn\.",
    "norms": r"norm",
    "embeddings": r"embed_tokens|lm_head",
}


def group_of(name: str) -> str:
    """The group of a parameter; 'other' when no pattern fits."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")


def freeze(model: nn.Module, trainable: Sequence[str]) -> None:
    """Sets requires_grad of every parameter.

    `ffn` in a mixture of experts means its experts, so one recipe serves both; LoRA's updates, where there are any, are always
    trained. Raises ConfigError (78) for a group that the model does not have.
    """
    present = {group_of(name) for name, _ in model.named_parameters()}
    wanted = set(trainable)
    if "ffn" in wanted and "experts" in present:
        wanted = wanted - {"ffn"} | {"experts"}
    absent = sorted(wanted - present - {"all"})
    if absent:
        works = ", ".join(["all", *sorted(present - {"lora"})])
        raise ConfigError([f"trainable: '{group}': the model has none (works: {works})" for group in absent])
    wanted.add("lora")
    for name, parameter in model.named_parameters():
        group = group_of(name)
        parameter.requires_grad_("all" in wanted or group in wanted)


def what_is_trained(model: nn.Module, rates: Mapping[str, float]) -> list[str]:
    """Two lines for people, after `freeze`: the groups that are trained, each with its learning rate, and those that are not."""
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        group, side = group_of(name), counts[parameter.requires_grad]
        side[group] = side.get(group, 0) + prod(whole_shape(parameter))
    lines = []
    for title, side in zip(("trained", "frozen"), counts.values(), strict=True):
        known = rates if title == "trained" else {}
        groups = [f"{group} {count:,}" + (f" (lr {known[group]:g})" if group in known else "") for group, count in side.items()]
        lines.append(f"{title}: {', '.join(groups) or 'nothing'}; {sum(side.values()):,} parameters")
    return lines


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also when ZeRO-3 has cut it and it looks empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
