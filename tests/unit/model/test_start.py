"""What a run starts from: nothing is filled up in silence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from h3scale.config.recipe import Architecture
from h3scale.errors import DataError
from h3scale.model.start import check_tokenizer, load_model, load_tokenizer, random_llama
from tests.tiny import tiny_llama, tiny_tokenizer

SIZES = Architecture(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def test_the_same_seed_gives_the_same_model_and_touches_no_other_randomness() -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (random_llama(SIZES, tokenizer, seed, 64) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)
    assert one.config.vocab_size == len(tokenizer)


def test_a_missing_tensor_is_named_instead_of_drawn_at_random(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"'lm_head\.weight' is missing"):
        load_model(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = load_model(tiny_llama(tmp_path / "model"))
    tokenizer = tiny_tokenizer(words=tuple(f"w{i}" for i in range(500)))
    with pytest.raises(DataError, match="the tokenizer has 506 tokens, the model embeds 42: they do not belong together"):
        check_tokenizer(model, tokenizer, "recipe.yaml")
    check_tokenizer(model, tiny_tokenizer(), "recipe.yaml")


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(tiny_llama(tmp_path / "model", tokenizer=False))
