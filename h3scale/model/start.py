"""The model a training run starts from: a folder, or a dense Llama with random weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from h3scale.config.recipe import Architecture
from h3scale.errors import DataError, MissingInputError
from h3scale.log import logger
from h3scale.model.expert_compute.in_transformers import use_experts
from h3scale.model.trainable import whole_shape


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder; no hub, no remote code. Raises DataError (65) when there is none."""
    from transformers import AutoTokenizer

    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no usable tokenizer ({str(error).splitlines()[0]})") from None


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, experts: str = "auto") -> nn.Module:
    """A causal language model of a folder, on the CPU, in `dtype`; no hub, no remote code.

    `experts`: what computes a fused model's (model.expert_compute). Raises DataError (65) when weights are missing or left over:
    transformers itself fills gaps with random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_folder(folder)
    logging.disable_progress_bar()  # its bars are per tensor and print on every rank
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
    findings = [f"{folder}: '{name}' is missing" for name in sorted(info["missing_keys"])]
    findings += [f"{folder}: '{name}' does not belong to the model" for name in sorted(info["unexpected_keys"])]
    findings += [f"{folder}: '{item[0]}' has another shape than the config says" for item in info["mismatched_keys"]]
    if findings:
        raise DataError(findings)
    use_experts(model, experts)
    return model


def placed(model: Any, device: torch.device | None = None) -> Any:
    """The model, on a GPU (none given: this process's) that has room for the weights and a fifth more, else where it is, with a
    warning."""
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None or device.type == "cpu":
        return model
    needed = 1.2 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = torch.cuda.mem_get_info(device)[0]
    if free > needed:
        return model.to(device)
    told = f"{device} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed"
    logger.warning("warning: %s: the model's outputs are computed on the CPU", told)
    return model


def check_folder(folder: str | Path) -> None:
    """MissingInputError (66) where there is none."""
    if not Path(folder).is_dir():
        raise MissingInputError(f"{folder}: no such folder")


def random_llama(sizes: Architecture, tokenizer: Any, seed: int, max_length: int) -> nn.Module:
    """A dense Llama of these sizes with random weights; the same for the same seed. Its vocabulary is the tokenizer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **sizes.model_dump(exclude={"rope_theta", "num_key_value_heads"}),
        num_key_value_heads=sizes.num_key_value_heads or sizes.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def check_tokenizer(model: nn.Module, tokenizer: Any, where: str) -> None:
    """Raises DataError (65) when the tokenizer has ids that the model has no embedding for."""
    vocab_size = whole_shape(model.get_input_embeddings().weight)[0]  # type: ignore[operator]
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model embeds {vocab_size}: they do not belong together"
        )
