"""Which dense families become which mixture-of-experts family, and the config of the result."""

import copy
from dataclasses import dataclass
from typing import Any

from h3scale.errors import DataError
from h3scale.model.experts import CONFIG_KEY, ExpertMap


@dataclass(frozen=True)
class Family:
    """`moe_type` and `architecture` are transformers' names; `autoep_preset` is DeepSpeed's."""

    moe_type: str
    architecture: str
    autoep_preset: str


FAMILIES = {
    "llama": Family("mixtral", "MixtralForCausalLM", "mixtral"),
    "mistral": Family("mixtral", "MixtralForCausalLM", "mixtral"),
}
AUTOEP_PRESETS = {family.moe_type: family.autoep_preset for family in FAMILIES.values()}

# Of Llama's config, what Mixtral has no word for and may be dropped.
_DENSE_ONLY = {"pretraining_tp", "mlp_bias", "attention_bias", "use_sliding_window"}


def moe_config(dense: dict[str, Any], expert_map: ExpertMap, top_k: int, where: str = "base") -> dict[str, Any]:
    """config.json of the fused model from the base's config.json (both plain dicts).

    Everything that both families know is carried over (RoPE, norms, tied embeddings, special tokens); Mixtral's own
    defaults for rope_theta and sliding_window never apply. Raises DataError (65) for a family or bias Mixtral cannot hold.
    """
    family = FAMILIES.get(dense.get("model_type", ""))
    if family is None:
        raise DataError(f"{where}: model_type '{dense.get('model_type')}' cannot become experts (works: {', '.join(FAMILIES)})")
    biased = [key for key in ("attention_bias", "mlp_bias") if dense.get(key)]
    if biased:
        raise DataError(f"{where}: {', '.join(biased)} is on, and {family.architecture} has no biases")
    if not 1 <= top_k <= expert_map.num_experts:
        raise DataError(f"top_k: {top_k} of {expert_map.num_experts} experts (works: 1 to {expert_map.num_experts})")
    config = {key: copy.deepcopy(value) for key, value in dense.items() if key not in _DENSE_ONLY}
    config.update(
        model_type=family.moe_type,
        architectures=[family.architecture],
        num_local_experts=expert_map.num_experts,
        num_experts_per_tok=top_k,
        output_router_logits=False,
        router_jitter_noise=0.0,
        sliding_window=dense.get("sliding_window"),
    )
    config[CONFIG_KEY] = expert_map.to_config()
    return config
