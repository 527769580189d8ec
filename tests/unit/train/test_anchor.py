"""What the anchor's shards hold, and in what."""

import pytest
import torch

from h3scale.train.anchor import Held, _held
from h3scale.train.shard import Shard

SHAPE = (4, 3, 5)
NAME = "model.layers.0.mlp.experts.w1"
WHOLE = torch.arange(60, dtype=torch.float32)


def test_spans_name_the_experts_of_a_shard_that_begins_and_ends_within_one() -> None:
    assert list(held(10, 40).spans()) == [(0, slice(0, 5)), (1, slice(5, 20)), (2, slice(20, 30))]


def test_an_empty_shard_has_no_experts() -> None:
    assert list(held(60, 60).spans()) == []


def held(begin: int, stop: int) -> Held:
    return Held(Shard(NAME, None, SHAPE, begin, stop, first_expert=0), 0, WHOLE[begin:stop])


class Engine:
    """As much of an engine as the anchor looks at: one stacked tensor of two experts, whole on this rank."""

    def __init__(self, values: torch.Tensor, offloaded: bool = False):
        self.module, self.offloaded = torch.nn.Module(), offloaded
        path = self.module
        for part in ("model", "layers", "0", "mlp", "experts"):
            path.add_module(part, torch.nn.Module())
            path = path.get_submodule(part)
        path.register_parameter("w1", torch.nn.Parameter(values))
        self.module.get_submodule("model.layers.0.mlp").ep_rank = 0

    def zero_offload_optimizer(self) -> dict[str, str] | None:
        return {"device": "cpu"} if self.offloaded else None


def starts(values: torch.Tensor, gammas: list[float]) -> list[torch.Tensor]:
    return [held.start for held in _held(Engine(values), "mixtral", gammas)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_start_that_16_bits_hold_exactly_takes_half_the_memory(dtype: torch.dtype) -> None:
    exact = torch.randn(2, 3, 4).to(dtype).float()
    assert starts(exact, [1.0, 1.0])[0].dtype == dtype
    finer = exact.clone()
    finer[0, 0, 0] += 1e-4
    (start,) = starts(finer, [1.0, 1.0])
    assert torch.equal(start, finer.flatten())


def test_experts_that_nothing_holds_have_no_start() -> None:
    assert not starts(torch.randn(2, 3, 4), [0.0, 0.0])
    assert starts(torch.randn(2, 3, 4), [0.0, 0.5])
