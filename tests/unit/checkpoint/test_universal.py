"""A universal checkpoint has what DeepSpeed's loader asks for; tests/distributed/test_universal.py has it loaded."""

import hashlib
import shutil
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest
import torch
from deepspeed.checkpoint import constants
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.inspect import inspect
from h3scale.checkpoint.journal import Work, partial_of
from h3scale.checkpoint.receipt import RECEIPT, check_receipt
from h3scale.checkpoint.shard_files import CODES
from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.checkpoint.verify import examine, verify
from h3scale.errors import DataError, StorageError, UnsafeError, UsageError
from tests.unit.checkpoint.conftest import NUM_EXPERTS, stacked, with_adam, write_training


def load(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def written(model, weights, probe, tmp_path_factory):
    """A run and the universal checkpoint of it, to be read only."""
    folder = tmp_path_factory.mktemp("written")
    write_training(folder / "run" / "step-000003", 3, model, weights, probe, world_size=4, edit=with_adam)
    convert(folder / "run", folder / "universal", to="universal", workers=2)
    return folder


@pytest.fixture
def universal(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
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


def test_it_is_read_back_as_the_same_model(universal, tmp_path):
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


def bytes_of(values: torch.Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def runs(run: Path, piece) -> bytes:
    """What the receipt says that a piece was, read from the checkpoint."""
    return b"".join((run / file).read_bytes()[start : start + length] for file, start, length in piece["bytes"])


def test_the_receipt_has_every_expert_once_with_the_bytes_it_came_from_and_again_for_each_moment(universal, weights, tmp_path):
    receipt, run = read_json(universal / RECEIPT), tmp_path / "run" / "step-000003"
    made = {"fp32": lambda values: values, "exp_avg": lambda values: -values, "exp_avg_sq": torch.square}
    trained = {name for name in weights if ".block_sparse_moe." in name}
    found = {}
    for file, entry in receipt["tensors"].items():
        held = load(universal / file)[constants.PARAM]
        assert (entry["file"], entry["sha256"]) == (file, hashlib.sha256(bytes_of(held)).hexdigest())
        assert (entry["dtype"], entry["shape"]) == (CODES[held.dtype], list(held.shape))
        assert b"".join(runs(run, piece) for piece in entry["from"]) == bytes_of(held)
        for piece in entry["from"]:
            state, name = Path(file).stem, piece["name"].removeprefix(f"{Path(file).stem} of ")
            assert runs(run, piece) == bytes_of(made[state](weights[name]))
            found.setdefault(state, []).append(name)
    assert {state: sorted(names) for state, names in found.items()} == {
        "fp32": sorted(weights),
        "exp_avg": sorted(trained),
        "exp_avg_sq": sorted(trained),
    }
    layers = len({name.split(".experts.")[0] for name in weights if ".experts." in name})
    num_matrices = sum(".experts." in name for name in weights)
    assert receipt["experts"] == {
        "layers": layers,
        "experts": NUM_EXPERTS,
        "matrices": num_matrices // layers // NUM_EXPERTS,
        "arrived": num_matrices,
    }
    files = {path.relative_to(universal).as_posix() for path in universal.rglob("*") if path.is_file()}
    assert receipt["files"].keys() == files - {RECEIPT}


def test_the_receipt_proves_the_folder_offline_wherever_it_lies(shard, tmp_path):
    convert(shard(edit=with_adam), tmp_path / "out", to="universal", receipt=tmp_path / "r.json")
    assert not (tmp_path / "out" / RECEIPT).exists()
    shutil.rmtree(tmp_path / "run")
    num_values = sum(1 for path in (tmp_path / "out").glob("zero/*/*.pt") if path.name != "step.pt")
    assert check_receipt(tmp_path / "r.json") == (num_values, [])
    assert verify(tmp_path / "r.json").num_proven_tensors == num_values
    assert verify(tmp_path / "out").num_proven_tensors is None
    shutil.copyfile(tmp_path / "r.json", tmp_path / "out" / RECEIPT)  # the folder's own says nothing of where it is
    assert verify(tmp_path / "out").num_proven_tensors == num_values


def test_there_is_no_receipt_where_none_is_wanted(shard, tmp_path):
    convert(shard(edit=with_adam), tmp_path / "out", to="universal", receipt=None)
    assert not (tmp_path / "out" / RECEIPT).exists()
    assert verify(tmp_path / "out").findings == []


W1 = "zero/model.layers.1.mlp.experts.w1"


@pytest.mark.parametrize("by", ["folder", "receipt"])
@pytest.mark.parametrize(
    ("file", "where", "text"),
    [
        (f"{W1}/fp32.pt", "values", f"sha256 differs from {RECEIPT} in {W1}/fp32.pt"),
        (f"{W1}/exp_avg_sq.pt", "values", f"sha256 differs from {RECEIPT} in {W1}/exp_avg_sq.pt"),
        (f"{W1}/exp_avg.pt", "pickle", f"its size or its header differs from {RECEIPT}"),
        (f"{W1}/step.pt", "middle", f"sha256 differs from {RECEIPT}"),
        ("zero/optimizer_state.pt", "middle", f"sha256 differs from {RECEIPT}"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "middle", f"sha256 differs from {RECEIPT}"),
    ],
)
def test_a_flipped_byte_of_any_file_is_found_and_named(universal, by, file, where, text):
    path = universal / file
    values = bytearray(path.read_bytes())
    at, length = read_json(universal / RECEIPT)["files"][file].get("values", [0, len(values)])
    values[at // 2 if where == "pickle" else at + length // 2] ^= 1
    path.write_bytes(values)
    errors = examine(universal if by == "folder" else universal / RECEIPT).errors
    assert f"{path}: {text}: the file has changed since it was written" in errors
    assert all(str(path) in error for error in errors)


@pytest.mark.parametrize("by", ["folder", "receipt"])
def test_a_file_that_is_missing_or_cut_off_is_found_and_named(universal, by):
    gone, short = universal / W1 / "exp_avg.pt", universal / W1 / "exp_avg_sq.pt"
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    errors = examine(universal if by == "folder" else universal / RECEIPT).errors
    assert f"{gone}: in {RECEIPT}, but missing" in errors
    assert any(error.startswith(f"{short}: its size") for error in errors)


def _drop(receipt, file):
    del receipt["tensors"][file]["from"][1]


def _twice(receipt, file):
    pieces = receipt["tensors"][file]["from"]
    pieces[1] = pieces[0]


def _other(receipt, file):
    pieces = receipt["tensors"][file]["from"]
    pieces[1]["bytes"] = pieces[0]["bytes"]


def _forgotten(receipt, file):
    del receipt["files"][file]


@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg.pt"])
@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (_drop, f"not every expert has arrived: {W1}/"),
        (_twice, f"not every expert has arrived: {W1}/"),
        (_other, "are made of the same bytes"),
        (_forgotten, "of which it has no sha256"),
    ],
)
def test_a_receipt_without_every_expert_is_found(universal, edit, file, text):
    receipt = read_json(universal / RECEIPT)
    edit(receipt, f"{W1}/{file}")
    write_json(universal / RECEIPT, receipt)
    assert any(text in error for error in examine(universal / RECEIPT).errors)


def test_without_a_config_experts_are_counted_by_the_names_that_are_stored(shard, tmp_path, weights):
    bare = shard(edit=with_adam) / "deepspeed"
    convert(bare, tmp_path / "bare", to="universal")
    receipt = read_json(tmp_path / "bare" / RECEIPT)
    stacks = [file for file, entry in receipt["tensors"].items() if len(entry["from"]) == NUM_EXPERTS]
    assert {Path(file).parent.name for file in stacks} == {name for name in stacked(weights) if ".experts." in name}
    assert receipt["experts"] == {"tensors": len(stacks), "arrived": len(stacks) * NUM_EXPERTS}
    assert verify(tmp_path / "bare" / RECEIPT).num_proven_tensors == len(receipt["tensors"])
    convert(bare, tmp_path / "known", to="universal", config_from=tmp_path / "run" / "step-000003" / "model")
    named = read_json(tmp_path / "known" / RECEIPT)
    assert named["experts"]["arrived"] == sum(".experts." in name for name in weights)
    assert named["files"] == receipt["files"]
    _drop(receipt, stacks[0])
    write_json(tmp_path / "bare" / RECEIPT, receipt)
    assert any(f"not every expert has arrived: {stacks[0]}" in error for error in examine(tmp_path / "bare" / RECEIPT).errors)


def test_other_experts_than_the_config_asks_for_are_refused(shard, tmp_path):
    run = shard(edit=with_adam)
    config = read_json(run / "model" / "config.json")
    write_json(tmp_path / "config.json", config | {"num_local_experts": NUM_EXPERTS + 1})
    with pytest.raises(DataError, match=f"config.json says that there are {NUM_EXPERTS + 1} experts"):
        convert(run, tmp_path / "out", to="universal", config_from=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_was_whole_before_a_kill_is_not_hashed_again(shard, tmp_path, monkeypatch):
    run = shard(edit=with_adam)
    convert(run, tmp_path / "undisturbed", to="universal")
    finish = Work.finish

    def stop_after(self, name, *more):
        finish(self, name, *more)
        if name == f"{W1}/fp32.pt":  # and before the moments, which are written at the same time
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "finish", stop_after)
    with pytest.raises(KeyboardInterrupt):
        convert(run, tmp_path / "out", to="universal")
    monkeypatch.setattr(Work, "finish", finish)
    changed = [f"{W1}/fp32.pt", f"{W1.replace('layers.1', 'layers.0')}/step.pt"]
    for file in changed:  # behind its back: only a second look could tell
        whole = partial_of(tmp_path / "out") / file
        whole.write_bytes(bytes(whole.stat().st_size))
    convert(run, tmp_path / "out", to="universal")
    assert (tmp_path / "out" / RECEIPT).read_bytes() == (tmp_path / "undisturbed" / RECEIPT).read_bytes()
    found = check_receipt(tmp_path / "out" / RECEIPT)[1]
    assert {line.split(":")[0] for line in found} == {f"{tmp_path}/out/{file}" for file in changed}


@pytest.mark.parametrize("within", ["", "step-000003", "step-000003/deepspeed"])
def test_nothing_replaces_what_it_is_made_from(shard, tmp_path, within):
    run = shard(edit=with_adam)
    with pytest.raises(UnsafeError, match="would replace what it is made from"):
        convert(run, tmp_path / "run" / within, to="universal", force=True)
    assert verify(run, hashes=True).errors == []


@pytest.mark.parametrize("room", [200, 5000])  # for no file of torch.save; for small ones
def test_a_disk_that_refuses_is_one_line_and_the_same_call_goes_on(written, tmp_path, room):
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be written|File too large"):
            convert(written / "run", tmp_path / "out", to="universal")
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    convert(written / "run", tmp_path / "out", to="universal")
    assert (tmp_path / "out" / RECEIPT).read_bytes() == (written / "universal" / RECEIPT).read_bytes()
