"""DeepSpeed's experts with another forward; test_losses and test_whole_run hold them against plain transformers."""

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts

from h3scale.errors import ConfigError
from h3scale.train.expert_compute import check_experts, use_experts


def experts(kind: type[GroupedExperts] = GroupedExperts, activation: str = "swiglu") -> GroupedExperts:
    return kind(8, 16, 3, use_grouped_mm=False, activation=activation)


class Newer(GroupedExperts):
    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return x


def test_the_installed_deepspeed_is_as_needed_and_another_is_refused_in_one_line() -> None:
    check_experts(experts())
    with pytest.raises(ConfigError, match=r"Newer\.forward\(self, x, offsets\).*works: deepspeed==0\.19\.8"):
        use_experts(torch.nn.ModuleList([experts(Newer)]), "loop")
    with pytest.raises(ConfigError, match=r"w1, w2, w3 and geglu_tanh"):
        use_experts(torch.nn.ModuleList([experts(activation="geglu_tanh")]), "loop")


def test_all_experts_of_a_model_get_the_backend_and_keep_names_and_parameters() -> None:
    model = torch.nn.ModuleList([experts(), experts()])
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    use_experts(model, "grouped_mm")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(isinstance(module, GroupedExperts) and type(module) is not GroupedExperts for module in model)
    assert list(model.state_dict()) == list(before)


def test_a_model_without_experts_stays_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    use_experts(model, "megablocks")  # not installed, and not asked for
    assert type(model) is torch.nn.Linear
