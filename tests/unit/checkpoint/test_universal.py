"""A universal checkpoint has what DeepSpeed's loader asks for; tests/distributed/test_universal.py has it loaded."""

import pytest
import torch
from deepspeed.checkpoint import constants
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.inspect import inspect
from h3scale.checkpoint.shards import ModelFolder
from h3scale.errors import DataError, UnsafeError, UsageError
from tests.unit.checkpoint.conftest import NUM_EXPERTS, stacked, with_adam


def load(path):
    return torch.load(path, weights_only=False)


@pytest.fixture
def universal(shard, tmp_path):
    convert(shard(world_size=4, ep_size=2, edit=with_adam), tmp_path / "universal", to="universal", workers=2)
    return tmp_path / "universal"


def test_every_parameter_has_its_values_moments_and_step(universal, weights):
    tensors = stacked(weights)
    assert {path.name for path in (universal / "zero").iterdir()} == tensors.keys() | {"optimizer_state.pt"}
    for name, values in tensors.items():
        folder = universal / "zero" / name
        found = {path.stem: load(path) for path in folder.iterdir()}
        assert torch.equal(found["fp32"][constants.PARAM], values)
        if ".mlp." not in name:
            assert found.keys() == {"fp32"}  # frozen
            continue
        assert torch.equal(found["exp_avg"][constants.PARAM], -values)
        assert torch.equal(found["exp_avg_sq"][constants.PARAM], values.square())
        assert found["step"] == 3
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            about = {key: value for key, value in found[state].items() if key != constants.PARAM}
            experts = {constants.EP_IS_EXPERT_PARAM: True, constants.EP_NUM_EXPERTS: NUM_EXPERTS} if ".experts." in name else {}
            assert about == {constants.CAT_DIM: 0} | experts


def test_what_the_optimizer_knows_of_itself_is_there_and_no_second_copy_of_values(universal):
    state = load(universal / "zero" / "optimizer_state.pt")
    assert isinstance(state["loss_scaler"], LossScaler)
    assert state["loss_scaler"].cur_scale == 1.0
    assert state["optimizer_state_dict"]["state"][0]["step"] == 3
    assert all(group["betas"] == (0.9, 0.99) for group in state["param_groups"])
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.0, 0.1, 0.1]
    # what DeepSpeed's ZeRO-3 loader gives to all groups
    assert state["optimizer_state_dict"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    assert "fp32_flat_groups" not in state
    model = load(universal / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert (model["global_steps"], model["module"], model["frozen_param_fragments"]) == (3, {}, {})


def test_it_is_read_back_as_the_same_model(universal, shard, tmp_path):
    found = inspect(universal)
    assert (found.kind, found.step, found.num_parameters) == (
        "DeepSpeed universal with AutoEP",
        3,
        inspect(tmp_path / "run").num_parameters,
    )
    consolidate(tmp_path / "run", tmp_path / "direct")
    consolidate(universal, tmp_path / "back", config_from=tmp_path / "run" / "step-000003" / "model")
    direct, back = ModelFolder(tmp_path / "direct"), ModelFolder(tmp_path / "back")
    assert direct.files.keys() == back.files.keys()
    assert all(torch.equal(direct.tensor(name), back.tensor(name)) for name in direct.files)
    with pytest.raises(UsageError, match="is a universal checkpoint already"):
        convert(universal, tmp_path / "again", to="universal")


def test_a_checkpoint_without_moments_and_options_without_sense_are_refused(shard, tmp_path):
    with pytest.raises(DataError, match=r"has no 'optimizer_state_dict"):
        convert(shard(), tmp_path / "out", to="universal")
    with pytest.raises(UsageError, match="takes no --dtype"):
        convert(tmp_path / "run", tmp_path / "out", to="universal", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_tensor_whose_name_leads_outside_is_refused(shard, tmp_path):
    def rename(rank, model_state, optim_state):
        with_adam(rank, model_state, optim_state)
        shapes = model_state["param_shapes"][0]
        shapes["../../escaped"] = shapes.pop("model.layers.1.mlp.router.gate.weight")

    with pytest.raises(UnsafeError, match="would lie outside the folder"):
        convert(shard(edit=rename), tmp_path / "out", to="universal")
    assert not list(tmp_path.rglob("escaped*"))
