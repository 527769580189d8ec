"""Backends of expert compute against float64, and what they keep and make on the way."""

from typing import Any, get_args

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from h3scale.config.recipe import ExpertCompute
from h3scale.errors import ConfigError
from h3scale.model.expert_compute import NAMES, check_fits, choose
from h3scale.model.expert_compute.in_transformers import use_experts
from tests.expert_case import CHOICES, Case

OWN = ("auto", "loop", "grouped_mm")  # those that need no package
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("stacked", [False, True], ids=["w1 and w3", "stacked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("name", OWN)
def test_outputs_and_all_gradients_are_those_of_float64(name: str, kind: str, dtype: torch.dtype, stacked: bool) -> None:
    Case(CHOICES[kind], experts=3, hidden=24, inner=40, dtype=dtype).check(choose(name), stacked)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 6))
    choices = draw(st.integers(1, experts))
    token = st.permutations(range(experts)).map(lambda order: order[:choices])
    chosen = draw(st.lists(token, min_size=1, max_size=20))
    eights = st.integers(1, 4).map(lambda n: 8 * n)
    return Case(chosen, experts, draw(eights), draw(eights), draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(OWN), st.booleans())
def test_any_routing_and_any_sizes_give_what_float64_gives(case: Case, name: str, stacked: bool) -> None:
    case.check_rounding(choose(name), stacked)


def test_the_loop_computes_in_float64_as_well() -> None:
    case = Case(CHOICES["skewed"], experts=3, hidden=8, inner=16, dtype=torch.float64)
    for found, wanted in zip(case.found(choose("loop"), False).values(), case.reference().values(), strict=True):
        torch.testing.assert_close(found, wanted)


class AutoEp:
    """DeepSpeed's experts with rows as AutoEP gives them: padded to eights with zeros, and rows of nobody after the last."""

    def __init__(self, dtype: torch.dtype = torch.float32, experts: int = 4):
        torch.manual_seed(0)
        self.experts = GroupedExperts(24, 40, experts, use_grouped_mm=False).to(dtype)
        for parameter in self.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.counts = torch.tensor([16, 0, *[8] * (experts - 2)], dtype=torch.int32)
        self.rows = torch.randn(int(self.counts.sum()) + 8, 24).to(dtype).requires_grad_()
        self.weights: list[Any] = [self.experts.w1, self.experts.w2, self.experts.w3]

    def results(self, output: torch.Tensor) -> list[torch.Tensor]:
        leaves = [self.rows, *self.weights]
        gradients = torch.autograd.grad(output[: self.counts.sum()].sin().sum(), leaves)
        return [output[: self.counts.sum()].detach(), gradients[0][: self.counts.sum()], *gradients[1:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_the_loop_gives_the_bits_of_deepspeeds_loop(dtype: torch.dtype) -> None:
    case = AutoEp(dtype)
    wanted = case.results(case.experts(case.rows, case.counts))
    found = case.results(choose("loop")(case.rows, case.counts, *case.weights))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", OWN)
def test_rows_of_nobody_may_hold_anything(name: str) -> None:
    case = AutoEp()
    wanted = case.results(choose("loop")(case.rows, case.counts, *case.weights))
    with torch.no_grad():
        case.rows[case.counts.sum() :] = torch.nan
    for one, other in zip(case.results(choose(name)(case.rows, case.counts, *case.weights)), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OWN)
def test_weights_that_zero_takes_away_after_the_forward_are_freed_and_may_come_back_for_the_backward(name: str) -> None:
    case = AutoEp()
    wanted = case.results(choose("loop")(case.rows, case.counts, *case.weights))
    copies = [weight.detach().clone() for weight in case.weights]
    output = choose(name)(case.rows, case.counts, *case.weights)
    gathered = [StorageWeakRef(weight.data.untyped_storage()) for weight in case.weights]
    for weight in case.weights:
        weight.data = torch.empty(0)
    assert all(storage.expired() for storage in gathered)
    for weight, copy in zip(case.weights, copies, strict=True):
        weight.data = copy
    for one, other in zip(case.results(output), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("again", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", OWN)
def test_experts_that_are_computed_again_give_the_same_bits(name: str, again: bool) -> None:
    case = AutoEp()
    wanted = case.results(choose(name)(case.rows, case.counts, *case.weights))
    leaves = [case.rows, *case.weights]
    output = checkpoint(choose(name), case.rows, case.counts, *case.weights, use_reentrant=again)
    output[: case.counts.sum()].sin().sum().backward()  # type: ignore[union-attr]
    found = [leaf.grad for leaf in leaves]
    found[0] = found[0][: case.counts.sum()]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted[1:], strict=True))


def test_widths_that_the_grouped_kernel_does_not_take_are_refused_in_one_line() -> None:
    case = Case([[0, 1]], experts=2, hidden=10, inner=24, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"grouped_mm needs widths .* 10 and 24 \(works: loop, auto\)"):
        case.found(choose("grouped_mm"), False)
    case.check(choose("auto"))


class Made(TorchDispatchMode):
    """Counts the numbers in new tensors of three dimensions: what is as large as all experts together."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 3 and result._base is None and not func.is_view:
            self.numbers += result.numel()
        return result


@pytest.mark.parametrize("experts", [2, 16])
def test_the_backward_makes_each_gradient_once_however_many_experts_there_are(experts: int) -> None:
    case = AutoEp(experts=experts)
    output = choose("loop")(case.rows, case.counts, *case.weights)
    with Made() as made:
        case.results(output)
    assert made.numbers == sum(weight.numel() for weight in case.weights)


def test_nothing_is_computed_for_weights_that_are_frozen() -> None:
    case = AutoEp()
    case.experts.requires_grad_(False)
    output = choose("loop")(case.rows, case.counts, *case.weights)
    with Made() as made:
        output.sum().backward()
    assert made.numbers == 0
    assert case.rows.grad is not None


def test_a_recipe_knows_the_backends_that_there_are() -> None:
    assert get_args(ExpertCompute) == NAMES
    with pytest.raises(ConfigError, match=r"experts: fastest \(works: auto, loop, grouped_mm, megablocks, megablocks_grouped\)"):
        choose("fastest")


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", OWN)
def test_a_transformers_model_gives_the_logits_and_gradients_of_its_eager_experts(name: str, family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], experts_implementation="eager")
    ids = torch.arange(2 * 12).view(2, 12) % SIZES["vocab_size"]

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.sin().sum().backward()
        return [logits.detach(), *[parameter.grad.clone() for parameter in model.parameters()]]

    wanted = results()
    use_experts(model, name)
    assert model.config._experts_implementation == f"h3scale_{name}"
    for one, other in zip(results(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert "h3scale" not in model.config.to_json_string()


def test_experts_of_another_kind_are_left_to_transformers_unless_a_backend_is_asked_for() -> None:
    config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, hidden_act="gelu")
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._experts_implementation
    use_experts(model, "auto")
    assert model.config._experts_implementation == before
    with pytest.raises(ConfigError, match=r"experts: loop computes SwiGLU, and the model's hidden_act is 'gelu' \(works: auto\)"):
        use_experts(model, "loop")


@pytest.mark.parametrize(
    ("word", "value"),
    [("is_transposed", True), ("has_bias", True), ("is_concatenated", False), ("has_gate", False), ("has_post_expert_norm", True)],
)
def test_experts_that_lie_otherwise_are_left_to_transformers_unless_a_backend_is_asked_for(word: str, value: bool) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    before = model.config._experts_implementation
    for layer in model.model.layers:
        setattr(layer.mlp.experts, word, value)
    use_experts(model, "auto")
    assert model.config._experts_implementation == before
    with pytest.raises(ConfigError, match=rf"computes SwiGLU, and MixtralExperts has {word}={value} \(works: auto\)"):
        use_experts(model, "loop")


def test_gpt_oss_goes_on_as_transformers_computes_it() -> None:
    config = GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12)[None]
    wanted = model(input_ids=ids).logits
    use_experts(model, "auto")
    assert torch.equal(model(input_ids=ids).logits, wanted)
    with pytest.raises(ConfigError, match=r"GptOssExperts has a gate of its own \(works: auto\)"):
        use_experts(model, "loop")


def test_experts_outside_of_transformers_registry_are_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.Identity()
    use_experts(model, "auto")
    with pytest.raises(ConfigError, match="MixtralForCausalLM has experts that are not in transformers' registry"):
        use_experts(model, "loop")


def test_what_a_backend_would_refuse_is_told_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MixtralConfig(**SIZES, intermediate_size=22, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ConfigError, match=r"grouped_mm needs widths .* 16 and 22 \(works: loop, auto\)"):
        use_experts(AutoModelForCausalLM.from_config(config), "grouped_mm")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_fits("megablocks", 128, 256, torch.bfloat16)
    check_fits("megablocks_grouped", 128, 256, torch.float32)
    with pytest.raises(ConfigError, match=r"multiplies fp32 in tf32 on a GPU, too roughly \(works: megablocks_grouped, auto\)"):
        check_fits("megablocks", 128, 256, torch.float32)
    with pytest.raises(ConfigError, match=r"blocks of 128, .* 64 and 256"):
        check_fits("megablocks", 64, 256, torch.bfloat16)
