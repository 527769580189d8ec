"""Which dense families become which mixture-of-experts family, and the config of the result."""

import copy
from dataclasses import dataclass
from typing import Any

from h3scale.errors import DataError
from h3scale.model.experts import CONFIG_KEY, ExpertMap


@dataclass(frozen=True)
class Family:
    """One mixture-of-experts family and its words in config.json.

    `moe_type` and `architecture` are transformers' names; `autoep_preset` is DeepSpeed's. `experts_key` counts the experts,
    `expert_size_key` is the inner size of one, `window_switch` turns a sliding window on; `refused_biases` of a dense model
    have no place here; `settings` is what a fused model always says.
    """

    moe_type: str
    architecture: str
    autoep_preset: str
    experts_key: str
    expert_size_key: str
    window_switch: str | None
    refused_biases: tuple[str, ...]
    settings: dict[str, Any]


_MIXTRAL = Family(
    moe_type="mixtral",
    architecture="MixtralForCausalLM",
    autoep_preset="mixtral",
    experts_key="num_local_experts",
    expert_size_key="intermediate_size",
    window_switch=None,
    refused_biases=("attention_bias", "mlp_bias"),
    settings={"router_jitter_noise": 0.0},
)
_QWEN3_MOE = Family(
    moe_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    autoep_preset="qwen3_moe",
    experts_key="num_experts",
    expert_size_key="moe_intermediate_size",
    window_switch="use_sliding_window",
    refused_biases=(),  # it has attention's, and a dense Qwen3 has no other
    # Every layer has experts, and the weights of those that are taken sum to 1, as Mixtral's do: else equal experts
    # would not be the dense model.
    settings={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
)

FAMILIES = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3_MOE}
MOE_FAMILIES = {family.moe_type: family for family in FAMILIES.values()}
AUTOEP_PRESETS = {family.moe_type: family.autoep_preset for family in FAMILIES.values()}

# Words of the dense configs that no family above has; windows are carried over by `_window`.
_DENSE_ONLY = {"pretraining_tp", "use_sliding_window", "sliding_window", "layer_types", "max_window_layers"}
_MOE_ONLY = {"num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}
_DENSE_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# transformers has used either word for either family, in its objects and in what these save.
_EXPERT_COUNTS = ("num_local_experts", "num_experts")


def num_experts(config: Any) -> int | None:
    """Experts in a layer, from a transformers config or a config.json dict; None for a dense model."""
    return next((value for key in _EXPERT_COUNTS if (value := _get(config, key))), None)


def expert_size(config: Any) -> int:
    """The inner size of one expert, from a transformers config or a config.json dict of a family above."""
    return int(_get(config, MOE_FAMILIES[_get(config, "model_type")].expert_size_key))


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the number of experts under the family's published word, which other tools read it by."""
    family = MOE_FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return config
    return {family.experts_key if key in _EXPERT_COUNTS else key: value for key, value in config.items()}


def moe_config(dense: dict[str, Any], expert_map: ExpertMap, top_k: int, where: str = "base") -> dict[str, Any]:
    """config.json of the fused model from the base's config.json (both plain dicts).

    Everything that both families know is carried over (RoPE, norms, tied embeddings, special tokens); the result's own
    defaults for rope_theta and sliding_window never apply. Raises DataError (65) for a family, bias or window that the
    result cannot hold.
    """
    family = FAMILIES.get(dense.get("model_type", ""))
    if family is None:
        raise DataError(f"{where}: model_type '{dense.get('model_type')}' cannot become experts (works: {', '.join(FAMILIES)})")
    biased = [key for key in family.refused_biases if dense.get(key)]
    if biased:
        raise DataError(f"{where}: {', '.join(biased)} is on, and {family.architecture} has no biases")
    if not 1 <= top_k <= expert_map.num_experts:
        raise DataError(f"top_k: {top_k} of {expert_map.num_experts} experts (works: 1 to {expert_map.num_experts})")
    window = _window(dense, family, where)
    dropped = {*_DENSE_ONLY, *family.refused_biases}
    config = {key: copy.deepcopy(value) for key, value in dense.items() if key not in dropped}
    config.update(
        copy.deepcopy(family.settings),
        model_type=family.moe_type,
        architectures=[family.architecture],
        num_experts_per_tok=top_k,
        output_router_logits=False,
        router_aux_loss_coef=0.0,  # the router follows alignments; balancing experts would work against that
        sliding_window=window,
    )
    config[family.experts_key] = expert_map.num_experts
    if "intermediate_size" in dense:
        config[family.expert_size_key] = dense["intermediate_size"]
    if family.window_switch:
        config[family.window_switch] = window is not None
    config[CONFIG_KEY] = expert_map.to_config()
    return config


def dense_config(moe: dict[str, Any]) -> dict[str, Any]:
    """config.json of the dense model that one expert is, from the full config of a mixture (all defaults filled in).

    A Mixtral with a sliding window becomes a Mistral, without one a Llama: equal weights compute the same in both.
    """
    family = MOE_FAMILIES[moe["model_type"]]
    window = moe.get("sliding_window") if family.window_switch is None or moe.get(family.window_switch) else None
    model_type = {"mixtral": "llama" if window is None else "mistral", "qwen3_moe": "qwen3"}[family.moe_type]
    dropped = {*_EXPERT_COUNTS, *_MOE_ONLY, *_DENSE_ONLY, *family.settings, family.expert_size_key, CONFIG_KEY}
    config = {key: copy.deepcopy(value) for key, value in moe.items() if key not in dropped}
    config |= {"model_type": model_type, "architectures": [_DENSE_ARCHITECTURES[model_type]]}
    config["intermediate_size"] = moe[family.expert_size_key]
    if model_type == "mistral":
        config["sliding_window"] = window
    if model_type == "qwen3":
        kind = "full_attention" if window is None else "sliding_attention"
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
        config["layer_types"] = [kind] * moe["num_hidden_layers"]
    return config


def _window(dense: dict[str, Any], family: Family, where: str) -> int | None:
    """The sliding window of all layers, None without one; DataError (65) when only some layers have it."""
    if dense["model_type"] == "llama":
        return None  # Llama has none, whatever its config.json says
    if dense["model_type"] == "mistral":
        return dense.get("sliding_window")
    layer_types = dense.get("layer_types") or ()
    sliding = [kind for kind in layer_types if kind == "sliding_attention"]
    if sliding and len(sliding) < len(layer_types):
        raise DataError(
            f"{where}: layer_types: {len(sliding)} of {len(layer_types)} layers have a sliding window, and "
            f"{family.architecture} has one window for all (works: all layers or none)"
        )
    return dense.get("sliding_window") if sliding else None


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)
