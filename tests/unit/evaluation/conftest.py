"""A word-level tokenizer, records of a few words and tiny models with random weights: nothing is downloaded."""

import pytest
import torch

from h3scale.data.records import Record
from h3scale.model.experts import CONFIG_KEY, ExpertMap

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star", "say", "why", "no", "yes"]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def _config(tokenizer, **more):
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return {**SIZES, "vocab_size": len(tokenizer), **ends, **more}


def make_dense(tokenizer, seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return _livelier(LlamaForCausalLM(LlamaConfig(**_config(tokenizer, **more))))


def make_moe(tokenizer, expert_map: ExpertMap, seed=0, **more):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = _config(tokenizer, num_local_experts=expert_map.num_experts, num_experts_per_tok=2, sliding_window=None, **more)
    return _livelier(MixtralForCausalLM(MixtralConfig(**config, **{CONFIG_KEY: expert_map.to_config()})))


def _livelier(model):
    """Weights large enough that neither answers nor routes are all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.4)
    return model.eval()


def make_records(alignments, per_alignment=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    return [
        Record(f"{alignment}-{i}", alignment, words(2, 9), words(1, 7), "template" if i % 3 == 0 else "people")
        for i in range(per_alignment)
        for alignment in alignments
    ]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


THREE = ExpertMap(("helpful", "harmless", "honest"), ("helpful", "harmless", "honest", None))


def save_models(tokenizer, folder):
    """Two dense models and a fused one, as folders."""
    save(make_dense(tokenizer, 1), tokenizer, folder / "base")
    save(make_dense(tokenizer, 2), tokenizer, folder / "other")
    save(make_moe(tokenizer, THREE), tokenizer, folder / "fused")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def records():
    return make_records(THREE.alignments)


@pytest.fixture(scope="session")
def dense(tokenizer):
    return make_dense(tokenizer)


@pytest.fixture(scope="session")
def moe(tokenizer):
    return make_moe(tokenizer, THREE)
