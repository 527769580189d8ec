"""Tiny models: one for each family, the same on every rank, with a tokenizer for any text and the shipped chat templates."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from h3scale.config.base import find
from h3scale.config.recipe import DenseFamily
from h3scale.data.encode import encode_records
from h3scale.data.records import Record
from h3scale.model.families import FAMILIES
from h3scale.model.start import load_model, load_tokenizer
from h3scale.model.tiny import FAMILY_SIZES, SIZES, random_dense, tiny_config, tiny_tokenizer

TEMPLATES = ("recipes/chat_template.jinja", "recipes/h3fusion_llama2_7b/chat_template.jinja")


def test_every_dense_family_has_sizes_and_a_name_in_recipes() -> None:
    assert set(FAMILY_SIZES) == set(FAMILIES) == set(get_args(DenseFamily))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_equals_another_and_the_same_seed_gives_the_same_model(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    sizes = [value for key, value in {**SIZES, **FAMILY_SIZES[family]}.items() if type(value) is int and key != "sliding_window"]
    sizes.append(config.vocab_size)
    assert len(set(sizes)) == len(sizes)
    one, other = random_dense(config), random_dense(config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    one.save_pretrained(str(tmp_path))
    tiny_tokenizer().save_pretrained(str(tmp_path))
    assert load_model(tmp_path).config.model_type == family
    assert len(load_tokenizer(tmp_path)) == config.vocab_size


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_is_the_text_and_the_end_that_the_shipped_template_writes(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = find(template).read_text()
    history = (("user", "Größe?"), ("assistant", "Groß."))
    record = Record("a", "helpful", "How tall?", "Tall.\n", "", history)
    (encoded,) = encode_records(tokenizer, [record])
    answers = [token & 2**31 - 1 for token in encoded.tokens.tolist() if token >> 31]
    said = tokenizer.decode(answers).split(tokenizer.eos_token)
    assert [text.strip("\n") for text in said] == ["Groß.", "Tall.", ""]
    assert encoded.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tokenizer_without_a_beginning_token_is_rendered_without_one(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = find(template).read_text()
    tokenizer.bos_token = None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert "None" not in text
    assert text.lstrip() == text


def test_a_template_beside_the_files_goes_before_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'its own' }}"
    tokenizer.save_pretrained(str(tmp_path), save_jinja_files=False)
    (tmp_path / "chat_template.jinja").write_text(find(TEMPLATES[0]).read_text())
    assert load_tokenizer(tmp_path).chat_template == find(TEMPLATES[0]).read_text()
