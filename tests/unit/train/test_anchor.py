"""The anchor's shards: what they hold is understood without a topology, and can be shared out anew over another one."""

import pytest
import torch

from h3scale.errors import DataError
from h3scale.train.anchor import Anchor, Held, _held, fill
from h3scale.train.shard import Shard

SHAPE = (4, 3, 5)
NAME = "model.layers.0.mlp.experts.w1"
WHOLE = torch.arange(60, dtype=torch.float32)


class Start(Anchor):
    """An anchor whose loss is not looked at."""

    def close_step(self) -> torch.Tensor:
        return torch.zeros(())


def anchor(values: torch.Tensor, begin: int, shape: tuple[int, int, int] = SHAPE) -> Anchor:
    made = Start.__new__(Start)
    made.held = [Held(Shard(NAME, None, shape, begin, begin + len(values), first_expert=0), 0, shape[0], values)]
    return made


def ranks(ep_size: int, edp_size: int, values: torch.Tensor) -> list[Anchor]:
    """As ZeRO-3 cuts: each EP rank's experts into equal parts, the last of them shorter where they do not divide."""
    anchors = []
    for ep_rank, experts in enumerate(values.chunk(ep_size)):
        length = -(-len(experts) // edp_size)
        parts = [experts[i * length : (i + 1) * length].clone() for i in range(edp_size)]
        anchors += [anchor(part, ep_rank * len(experts) + i * length) for i, part in enumerate(parts)]
    return anchors


@pytest.mark.parametrize("old", [(1, 1), (2, 2), (4, 1), (1, 7), (2, 4)])
@pytest.mark.parametrize("new", [(1, 1), (2, 2), (4, 1), (1, 7), (2, 4)])
def test_states_of_one_topology_fill_the_shards_of_another(old: tuple[int, int], new: tuple[int, int]) -> None:
    states = [anchor.state_dict() for anchor in reversed(ranks(*old, WHOLE))]
    filled = ranks(*new, torch.zeros_like(WHOLE))
    for made in filled:
        made.load_state_dict(states)
    assert torch.equal(torch.cat([made.held[0].start for made in filled]), WHOLE)


def test_spans_name_the_experts_of_a_shard_that_begins_and_ends_within_one() -> None:
    shard = anchor(WHOLE[10:40], 10).held[0]
    assert list(shard.spans()) == [(0, slice(0, 5)), (1, slice(5, 20)), (2, slice(20, 30))]


def test_an_empty_shard_has_no_experts_and_needs_no_state() -> None:
    empty = anchor(WHOLE[:0], 60)
    assert list(empty.held[0].spans()) == []
    empty.load_state_dict([])


def test_a_missing_rank_is_named_by_what_it_had() -> None:
    states = [made.state_dict() for made in ranks(2, 2, WHOLE)]
    with pytest.raises(DataError, match=f"{NAME} is not there from value 15 on .works: the states of all ranks."):
        anchor(torch.zeros(60), 0).load_state_dict([states[0], states[2], states[3]])


def test_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"has shape \(4, 5, 3\), the model's is \(4, 3, 5\)"):
        anchor(torch.zeros(60), 0).load_state_dict([anchor(WHOLE, 0, (4, 5, 3)).state_dict()])


def test_filling_stops_at_a_gap_and_takes_nothing_twice() -> None:
    target = torch.zeros(6)
    assert fill(target, 10, [(16, torch.ones(3)), (8, torch.ones(4)), (9, torch.ones(2)), (12, torch.full((2,), 2.0))]) == 4
    assert target.tolist() == [1, 1, 2, 2, 0, 0]


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


def test_a_start_in_bf16_takes_finer_values_from_another_ranks_state() -> None:
    finer = WHOLE + 1e-4
    rough = anchor(torch.zeros(60).bfloat16(), 0)
    rough.load_state_dict([anchor(finer, 0).state_dict()])
    assert torch.equal(rough.held[0].start, finer)
