"""ZeRO-1 and ZeRO-2 checkpoints come back bit for bit for any topology; what is not whole is refused."""

import pytest
import torch
from safetensors.torch import load_file

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.errors import DataError, MissingInputError

TOPOLOGIES = [(1, 1), (2, 2), (3, 1), (4, 2), (4, 4), (7, 1), (8, 4)]


@pytest.mark.parametrize(("world_size", "ep_size"), TOPOLOGIES)
@pytest.mark.parametrize(
    "frozen",
    [lambda name: False, lambda name: ".mlp." not in name, lambda name: ".experts." in name],
    ids=["nothing frozen", "dense frozen", "experts frozen"],
)
def test_every_tensor_comes_back_bit_for_bit(shard, weights, tmp_path, world_size, ep_size, frozen):
    summary = consolidate(shard(world_size=world_size, ep_size=ep_size, stage=2, frozen=frozen), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert (summary.kind, summary.world_size, summary.ep_size) == ("DeepSpeed ZeRO-2 with AutoEP", world_size, ep_size)


def test_the_second_name_of_a_router_is_no_tensor(shard):
    found = open_deepspeed(shard(stage=2) / "deepspeed")
    assert not [name for name in found.entries if "gate.gate" in name and "router" not in name]


def test_a_missing_rank_is_named(shard):
    folder = shard(stage=2, world_size=4) / "deepspeed"
    (folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MissingInputError, match="the states of rank 3 are missing"):
        open_deepspeed(folder)


def test_a_missing_expert_is_named_where_it_is_frozen_and_not_needed_where_it_is_trained(shard):
    for name, frozen in (("frozen", lambda name: True), ("trained", lambda name: ".mlp." not in name)):
        folder = shard(name, stage=2, frozen=frozen) / "deepspeed"
        (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
        if name == "trained":
            open_deepspeed(folder)
        else:
            with pytest.raises(MissingInputError, match="layer 1, expert 2 are missing"):
                open_deepspeed(folder)


def test_a_piece_that_no_rank_has_is_refused(shard):
    def forget(rank, model_state, optim_state):
        if rank == 1:
            optim_state["param_slice_mappings"][1].popitem()

    with pytest.raises(DataError, match=r"lacks experts \[2, 3\] of EP rank 1"):
        open_deepspeed(shard(stage=2, edit=forget) / "deepspeed")


def test_a_piece_outside_its_group_is_refused(shard):
    def shift(rank, model_state, optim_state):
        next(iter(optim_state["param_slice_mappings"][1].values())).start = 10**6

    with pytest.raises(DataError, match="outside of its group"):
        open_deepspeed(shard(stage=2, edit=shift) / "deepspeed")


def test_a_tensor_that_the_model_states_do_not_name_is_refused(shard):
    def forget(rank, model_state, optim_state):
        if rank == 0:
            model_state["param_shapes"][0].popitem()

    with pytest.raises(DataError, match="does not name"):
        open_deepspeed(shard(stage=2, edit=forget) / "deepspeed")
