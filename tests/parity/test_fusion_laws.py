"""Laws 1, 2 and 12: fused models against the dense models they were made of, run by plain transformers."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.config.fuse import FuseRecipe
from h3scale.data.encode import encode_records
from h3scale.data.sources import read_records
from h3scale.evaluation.evaluate import evaluate_model, open_model
from h3scale.evaluation.generate import generate
from h3scale.fusion.execute import fuse
from h3scale.model.experts import ExpertMap
from h3scale.model.families import FAMILIES, num_experts
from h3scale.model.names import DENSE_FFN, MOE
from h3scale.model.router import forced_routing, router_modules
from tests.tiny import DENSE_FAMILIES, tiny_aligned, tiny_dense, tiny_llama, tiny_records, tiny_tokenizer

NAMES = ("helpful", "harmless", "honest", "brief", "kind")
FFN = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[4, 9, 30, 7, 12, 5, 18, 3], [4, 8, 8, 41, 22, 5, 11, 3]])

# Every size other than the default's, so that a literal in the code cannot fit both.
OTHER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
TIED = {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "attention_bias": False}
BASES = [
    *((family, sizes) for family in DENSE_FAMILIES for sizes in ({}, OTHER, TIED)),
    ("mistral", {"sliding_window": None}),
    ("qwen3", WINDOW),
]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def dense_logits(folder: Path):
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def load(folder: Path):
    """A fused model, loaded whole by plain transformers."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ in {family.architecture for family in FAMILIES.values()}
    assert not any(info.values()), info
    return model


def fused(tmp_path: Path, models: dict[str, Path], **changes) -> Path:
    """Fuses with a random router: these laws hold for every router."""
    router = {"init": "random", **changes.pop("router", {})}
    paths = {label: str(folder) for label, folder in models.items()}
    recipe = {"base": str(tmp_path / "base"), "models": paths, "out": str(tmp_path / "fused"), "router": router, **changes}
    fuse(FuseRecipe.model_validate(recipe))
    return Path(recipe["out"])


def shake_routers(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in router_modules(model):
            router.weight.copy_(3 * torch.randn(router.weight.shape, generator=generator))


def alone(model, expert: int):
    """The model's logits when every token goes to one expert."""
    weights_E = torch.zeros(num_experts(model.config))
    weights_E[expert] = 1
    with forced_routing(model, weights_E):
        return logits_of(model)


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def make_adapter(folder: Path, base: Path, seed: int, **settings) -> torch.Tensor:
    """A real PEFT adapter with A and B both random, alpha != r; gives the logits of PEFT's own model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 10, "target_modules": FFN, "init_lora_weights": False, **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**values))
    model.save_pretrained(folder)
    return logits_of(model)


@pytest.mark.parametrize(("family", "sizes"), BASES)
def test_law_1_equal_experts_are_the_dense_model_whatever_the_router_says(tmp_path, family, sizes):
    base = tiny_dense(family, tmp_path / "base", **sizes)
    wanted = dense_logits(base)
    assert wanted.std() > 0.1  # logits near zero would be close to anything
    for top_k in (1, 2, 3):
        model = load(fused(tmp_path, dict.fromkeys(NAMES[:3], base), top_k=top_k, out=str(tmp_path / f"top-{top_k}")))
        assert model.config.num_experts_per_tok == top_k
        for seed in range(3):
            shake_routers(model, seed)
            close(logits_of(model), wanted)


def test_the_windows_of_these_bases_matter(tmp_path):
    """Else a window that is lost on the way would not be seen above."""
    for family, window in (("mistral", {}), ("qwen3", WINDOW)):
        base = tiny_dense(family, tmp_path / family, **window)
        wide = AutoModelForCausalLM.from_pretrained(base, sliding_window=64, dtype=torch.float32)
        assert (logits_of(wide) - dense_logits(base)).abs().max() > 0.1


@pytest.mark.parametrize(("family", "sizes"), BASES)
@pytest.mark.parametrize(("num_alignments", "copies", "general_experts"), [(2, 1, 0), (3, 2, 2), (5, 1, 2)])
def test_law_2_an_expert_alone_is_its_aligned_model(tmp_path, family, sizes, num_alignments, copies, general_experts):
    base = tiny_dense(family, tmp_path / "base", **sizes)
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(NAMES[:num_alignments])}
    model = load(fused(tmp_path, models, experts_per_alignment=copies, general_experts=general_experts))
    expert_map = ExpertMap.from_config(model.config)
    labelled = [label for label in models for _ in range(copies)]
    assert expert_map == ExpertMap(tuple(models), (*labelled, *[None] * general_experts))
    wanted = [dense_logits(models[label] if label else base) for label in expert_map.experts]
    for expert, logits in enumerate(wanted):
        close(alone(model, expert), logits)
    for one, other in combinations(range(expert_map.num_experts), 2):
        equal = expert_map.experts[one] == expert_map.experts[other]
        assert ((wanted[one] - wanted[other]).abs().max() > 0.1) == (not equal)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3}},
        {"layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "r": 1},
    ],
)
def test_law_2_holds_for_real_peft_adapters(tmp_path, settings):
    base = tiny_llama(tmp_path / "base")
    wanted = {label: make_adapter(tmp_path / label, base, i + 1, **settings) for i, label in enumerate(NAMES[:3])}
    model = load(fused(tmp_path, {label: tmp_path / label for label in wanted}))
    for expert, logits in enumerate(wanted.values()):
        assert (logits - dense_logits(base)).abs().max() > 0.1
        close(alone(model, expert), logits)
    close(alone(model, 3), dense_logits(base))


def test_law_2_folders_and_adapters_may_be_mixed(tmp_path):
    base = tiny_llama(tmp_path / "base")
    models = {"dense": tiny_aligned(tmp_path / "dense", base, seed=1), "adapter": tmp_path / "adapter"}
    wanted = make_adapter(tmp_path / "adapter", base, seed=2)
    model = load(fused(tmp_path, models))
    close(alone(model, 0), dense_logits(models["dense"]))
    close(alone(model, 1), wanted)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_law_2_experts_are_tensors_of_their_own(tmp_path, family):
    base = tiny_dense(family, tmp_path / "base")
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(NAMES[:3])}
    folder = ModelFolder(fused(tmp_path, models))
    for layer in range(2):
        for projection, template in MOE[FAMILIES[family].moe_type].hub_experts.items():
            name = DENSE_FFN[projection].format(layer=layer)
            for expert, source in enumerate([*models.values(), base]):
                values = folder.tensor(template.format(layer=layer, expert=expert))
                assert torch.equal(values, ModelFolder(source).tensor(name))


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_fused_model_of_every_family_answers_and_is_measured_and_its_experts_have_names(tmp_path, family):
    base = tiny_dense(family, tmp_path / "base")
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(NAMES[:2])}
    out = fused(tmp_path, models, experts_per_alignment=2, general_experts=2, top_k=3)
    model, tokenizer = open_model(out)
    answer = generate(model, tokenizer, "sort1 lie2 ask3", max_new_tokens=8)
    ids = list(answer.prompt_ids)
    for token in answer.new_ids:  # greedy without a cache
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
        ids.append(token)
    assert len(answer.new_ids) > 1
    names = ["helpful", "helpful 2", "harmless", "harmless 2", "general", "general 2"]
    assert [share.expert for share in answer.experts] == names
    assert sum(share.weight for share in answer.experts) == pytest.approx(1)

    encoded = encode_records(tokenizer, read_records([tiny_records(tmp_path / "records.jsonl", NAMES[:2])]))
    router = evaluate_model(model, tokenizer, encoded)[0]["router"]
    assert [expert["name"] for expert in router["experts"]] == names
    taken = sum(sum(load.values()) for load in router["tokens_per_expert"].values())
    assert taken == sum(len(item.tokens) for item in encoded) * 3 * model.config.num_hidden_layers


def test_average_blends_what_is_shared_and_leaves_the_experts(tmp_path):
    base = tiny_llama(tmp_path / "base")
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1, ffn_only=False) for i, label in enumerate(NAMES[:2])}
    folder = ModelFolder(fused(tmp_path, models, shared="average"))
    sources = [ModelFolder(path) for path in models.values()]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"):
        wanted = (sources[0].tensor(name) + sources[1].tensor(name)) / 2
        torch.testing.assert_close(folder.tensor(name), wanted)
        assert not torch.equal(wanted, ModelFolder(base).tensor(name))
    expert = MOE["mixtral"].hub_experts["up"].format(layer=1, expert=1)
    assert torch.equal(folder.tensor(expert), sources[1].tensor(DENSE_FFN["up"].format(layer=1)))


def test_the_fused_model_keeps_the_dtype_of_the_base(tmp_path):
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    models = {"a": tiny_aligned(tmp_path / "a", base, seed=1), "b": tiny_llama(tmp_path / "b", seed=2)}
    folder = ModelFolder(fused(tmp_path, models))
    assert {spec.dtype for spec in folder.specs.values()} == {torch.bfloat16}
    values = folder.tensor(MOE["mixtral"].hub_experts["up"].format(layer=0, expert=1))
    assert torch.equal(values, ModelFolder(models["b"]).tensor(DENSE_FFN["up"].format(layer=0)).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "sizes", "left_out"),
    [
        ("llama", {"num_key_value_heads": 4}, ("rope_parameters", "rms_norm_eps", "num_key_value_heads")),
        (
            "mistral",
            {"num_key_value_heads": 8, "num_attention_heads": 8},
            ("rope_parameters", "rms_norm_eps", "num_key_value_heads"),
        ),
        ("qwen3", {"head_dim": 128}, ("rope_parameters", "rms_norm_eps", "head_dim")),
    ],
)
def test_what_a_config_leaves_out_has_the_default_of_its_own_family(tmp_path, family, sizes, left_out):
    """rope_theta, rms_norm_eps, num_key_value_heads, head_dim: the fused family's defaults are others than the dense one's."""
    base = tiny_dense(family, tmp_path / "base", **sizes)
    config = read_json(base / "config.json")
    for key in left_out:
        assert config.pop(key) is not None
    write_json(base / "config.json", config)
    close(logits_of(load(fused(tmp_path, dict.fromkeys(NAMES[:2], base)))), dense_logits(base))


def test_tokenizer_and_generation_config_come_along(tmp_path):
    base = tiny_llama(tmp_path / "base")
    write_json(base / "generation_config.json", {"max_new_tokens": 17, "eos_token_id": 3})
    models = {"a": tiny_aligned(tmp_path / "a", base, seed=1), "b": tiny_aligned(tmp_path / "b", base, seed=2)}
    out = fused(tmp_path, models)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert load(out).generation_config.max_new_tokens == 17


@pytest.mark.parametrize("init", ["ridge", "logistic", "prompt_mean"])
@pytest.mark.parametrize("num_alignments", [2, 3, 5])
def test_a_fitted_router_knows_unseen_records_and_a_random_one_does_not(tmp_path, init, num_alignments):
    base = tiny_llama(tmp_path / "base")
    labels = NAMES[:num_alignments]
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(labels)}
    train = tiny_records(tmp_path / "train.jsonl", labels, per_alignment=16)
    heldout = tiny_records(tmp_path / "heldout.jsonl", labels, per_alignment=8, seed=5)
    router = {"init": init, "records": [str(train)], "heldout_records": [str(heldout)]}
    out = fused(tmp_path, models, router=router)
    report = read_json(out / "fuse_report.json")["router"]
    mean = sum(report["accuracy"].values()) / num_alignments
    by_chance = sum(report["random_accuracy"].values()) / num_alignments
    assert mean > (0.9 if init != "prompt_mean" else 0.7), report
    assert by_chance < mean - 0.15, report
    assert str(tmp_path) not in (out / "fuse_report.json").read_text()
    for router_module in router_modules(load(out)):
        rows_EH = router_module.weight
        assert rows_EH[num_alignments:].abs().max() == 0
        torch.testing.assert_close(rows_EH.sum(0), torch.zeros(rows_EH.shape[1]), rtol=0, atol=1e-4)
        assert rows_EH[:num_alignments].norm(dim=1).min() > 0


def test_copies_with_as_many_more_choices_start_as_the_model_without_copies(tmp_path):
    """What `top_k` counts: c experts an alignment and c times as many choices are the same mixture, copies being equal."""
    base = tiny_llama(tmp_path / "base")
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(NAMES[:3])}
    one = load(fused(tmp_path, models, top_k=2, general_experts=1, out=str(tmp_path / "one")))
    shake_routers(one, 0)
    for copies in (2, 3):
        sizes = {"experts_per_alignment": copies, "general_experts": copies, "top_k": 2 * copies}
        many = load(fused(tmp_path, models, **sizes, out=str(tmp_path / f"{copies}")))
        with torch.no_grad():
            for router, rows in zip(router_modules(many), router_modules(one), strict=True):
                router.weight.copy_(rows.weight.repeat_interleave(copies, 0))
        close(logits_of(many), logits_of(one))


def test_the_same_recipe_writes_the_same_bytes(tmp_path):
    base = tiny_llama(tmp_path / "base")
    models = {label: tiny_aligned(tmp_path / label, base, seed=i + 1) for i, label in enumerate(NAMES[:2])}
    records = tiny_records(tmp_path / "train.jsonl", NAMES[:2])
    contents = []
    for out in ("one", "two"):
        router = {"init": "ridge", "records": [str(records)]}
        fused(tmp_path, models, out=str(tmp_path / out), router=router, experts_per_alignment=2)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / out).iterdir())})
    assert contents[0] == contents[1]
