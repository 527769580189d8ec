"""Consolidation gives back what was sharded, bit for bit, for any topology, and refuses everything that is not whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from h3scale.checkpoint import extents, stream
from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.expected import expected_shapes
from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.checkpoint.receipt import sha256
from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.checkpoint.training_checkpoint import find_checkpoint
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.cli.checkpoint import app, parse_size
from h3scale.errors import DataError, MissingInputError, OutputError, UnsafeError, UsageError
from h3scale.model.families import MOE_FAMILIES, as_published

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (6, 2), (7, 1), (8, 4)]


@pytest.mark.parametrize(("world_size", "ep_size"), TOPOLOGIES)
def test_every_tensor_comes_back_bit_for_bit(shard, weights, tmp_path, world_size, ep_size):
    summary = consolidate(shard(world_size=world_size, ep_size=ep_size), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert (summary.world_size, summary.ep_size, summary.num_tensors, summary.step) == (world_size, ep_size, len(weights), 3)


def test_everything_trained_comes_back_too(shard, weights, tmp_path):
    consolidate(shard(world_size=4, ep_size=2, frozen=lambda name: False), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_experts_placed_in_another_order_come_back_in_theirs(shard, weights, tmp_path):
    consolidate(shard(world_size=4, ep_size=2, placement=[[3, 0], [1, 2]]), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_the_folder_has_all_that_a_model_needs(shard, model, tmp_path):
    consolidate(shard(), tmp_path / "out")
    config, trained = read_json(tmp_path / "out" / "config.json"), read_json(model / "config.json")
    assert config["h3scale"] == trained["h3scale"]
    assert config["dtype"] == "float32"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert (tmp_path / "out" / "receipt.json").is_file()


def test_weights_are_rounded_to_the_format_asked_for(shard, weights, tmp_path):
    consolidate(shard(), tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name].bfloat16()) for name in weights)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_small_shards_hold_the_same_tensors(shard, weights, tmp_path):
    consolidate(shard(), tmp_path / "out", max_shard_bytes=4000)
    folder = ModelFolder(tmp_path / "out")
    assert len(set(folder.files.values())) > 3
    assert all(torch.equal(folder.tensor(name), weights[name]) for name in weights)


def test_every_byte_is_read_once_and_no_more_than_a_block_at_a_time(shard, weights, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(extents, "BLOCK_BYTES", 256)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 256)
    read = stream.read_into
    monkeypatch.setattr(stream, "read_into", lambda file, target, *more: sizes.append(len(target)) or read(file, target, *more))
    consolidate(shard(world_size=4, ep_size=2), tmp_path / "out", dtype=torch.bfloat16)
    assert sum(sizes) == 4 * sum(values.numel() for values in weights.values())
    assert max(sizes) == 256
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name].bfloat16()) for name in weights)


def described(folder):
    """The entry of a config that a test has changed."""
    config = folder / "model" / "config.json"
    return {"model/config.json": {"size": config.stat().st_size, "sha256": sha256(config)}}


def test_an_untied_config_gets_both_copies_of_tied_weights(shard, weights, tmp_path):
    folder = shard()
    config = read_json(folder / "model" / "config.json")
    (folder / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write_manifest(folder, {"step": 1, "files": read_manifest(folder)["files"] | described(folder)})
    consolidate(folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_expected_names_are_those_that_transformers_writes(model, weights):
    expected = expected_shapes(read_json(model / "config.json"), model)
    assert expected == {name: tuple(values.shape) for name, values in weights.items()}


@pytest.mark.parametrize("moe_type", MOE_FAMILIES)
def test_names_of_every_family_are_expected_from_its_config_whichever_word_counts_the_experts(tmp_path, moe_type):
    """Qwen3-MoE's names hold `.mlp.` on disk as in transformers' own modules; only the latter must be replaced."""
    sizes = {"num_local_experts": 3, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 20}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    sizes[MOE_FAMILIES[moe_type].expert_size_key] = 28
    AutoModelForCausalLM.from_config(AutoConfig.for_model(moe_type, **sizes)).save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path)
    found = {name: spec.shape for name, spec in folder.specs.items()}
    for config in (folder.config, as_published(folder.config)):
        assert expected_shapes(config, tmp_path) == found


def _refused(error, folder, out, *texts, **options):
    with pytest.raises(error) as caught:
        consolidate(folder, out, **options)
    for text in texts:
        assert text in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".partial-*"))


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_missing_rank_is_refused(shard, tmp_path, kind):
    folder = shard()
    (folder / "deepspeed" / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt").unlink()
    _refused(DataError, folder, tmp_path / "out", f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt", "missing")
    (folder / "manifest.json").unlink()  # and without a manifest that lists the files
    _refused(MissingInputError, folder / "deepspeed", tmp_path / "out", f"{kind} states of rank 1", config_from=folder / "model")


def test_a_lost_last_rank_is_refused_without_a_manifest(shard, tmp_path):
    folder = shard(world_size=4, ep_size=2)
    for path in (folder / "deepspeed").glob("zero_pp_rank_3_*"):
        path.unlink()
    text = "the states of rank 3 are missing"
    _refused(MissingInputError, folder / "deepspeed", tmp_path / "out", text, config_from=folder / "model")


def test_a_missing_expert_is_refused(shard, tmp_path):
    def forget(rank, model_state, optim_state):
        name = "model.layers.1.mlp.experts.w2"
        group = next(i for i, names in enumerate(model_state["param_shapes"]) if name in names)
        names, flat = model_state["param_shapes"][group], optim_state["fp32_flat_groups"][group]
        start = sum(names[n].numel() for n in names if list(names).index(n) < list(names).index(name))
        shape = names.pop(name)
        optim_state["fp32_flat_groups"][group] = torch.cat([flat[:start], flat[start + shape.numel() :]])

    _refused(DataError, shard(edit=forget), tmp_path / "out", "model.layers.1.mlp.experts.w2 (4, 16, 20) is missing")


def test_one_expert_too_few_is_refused(shard, tmp_path):
    def shrink(rank, model_state, optim_state):
        for layer in model_state["ds_autoep_layers"]:
            layer["expert_placement"]["ranks"][1]["experts"] = [2]

    _refused(DataError, shard(edit=shrink), tmp_path / "out", "experts [0, 1, 2] are placed, of 4")


def test_lost_experts_of_one_ep_rank_are_refused(shard, tmp_path):
    def forget(rank, model_state, optim_state):
        if rank == 1:
            model_state["param_shapes"][1:] = [{}, {}]
            optim_state["fp32_flat_groups"][1:] = [torch.empty(0), torch.empty(0)]

    _refused(DataError, shard(edit=forget), tmp_path / "out", "model.layers.0.mlp.experts.w1: lacks experts [2, 3] of EP rank 1")


def test_frozen_tensors_that_were_not_saved_are_refused(shard, tmp_path):
    def forget(rank, model_state, optim_state):
        model_state["frozen_param_shapes"] = model_state["frozen_param_fragments"] = None

    folder = shard(edit=forget)
    _refused(DataError, folder, tmp_path / "out", "model.embed_tokens.weight (33, 16) is missing", "self_attn.q_proj.weight")


def test_an_unknown_tensor_is_refused(shard, tmp_path):
    def add(rank, model_state, optim_state):
        model_state["frozen_param_shapes"]["adapter.weight"] = torch.Size([2])
        model_state["frozen_param_fragments"]["adapter.weight"] = torch.ones(1)

    _refused(DataError, shard(edit=add), tmp_path / "out", "adapter.weight (2,) is in no such model")


def test_another_shape_is_refused(shard, tmp_path):
    folder = shard()
    config = read_json(folder / "model" / "config.json")
    (folder / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 24, "num_local_experts": 5}))
    write_manifest(folder, {"step": 1, "files": read_manifest(folder)["files"] | described(folder)})
    text = "model.layers.0.mlp.experts.w1 is (4, 20, 16), config.json asks for (5, 24, 16)"
    _refused(DataError, folder, tmp_path / "out", text)


def test_ranks_of_two_runs_are_refused(shard, tmp_path):
    folder = shard() / "deepspeed"
    optim = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (folder / f"bf16_{optim.name}").write_bytes(optim.read_bytes())
    _refused(DataError, folder, tmp_path / "out", "two runs in one folder", config_from=folder.parent / "model")


def test_a_part_that_two_ranks_claim_is_refused(shard, tmp_path):
    def claim(rank, model_state, optim_state):
        for group in optim_state["ds_zero_partition_groups"]:
            group["partition_rank"] = 0

    _refused(DataError, shard(edit=claim), tmp_path / "out", "does not fit")


def test_another_layout_of_the_states_is_refused_with_the_version(shard, tmp_path):
    def rename(rank, model_state, optim_state):
        model_state["ds_version"] = "0.21"
        for layer in model_state["ds_autoep_layers"]:
            layer["placement"] = layer.pop("expert_placement")

    _refused(DataError, shard(edit=rename), tmp_path / "out", "KeyError('expert_placement')", "written by 0.21")


def test_values_that_the_names_do_not_fill_are_refused(shard, tmp_path):
    def add(rank, model_state, optim_state):
        optim_state["fp32_flat_groups"][0] = torch.cat([optim_state["fp32_flat_groups"][0], torch.zeros(1)])

    _refused(DataError, shard(edit=add), tmp_path / "out", "a group holds 65 values where its names need 64")


def test_a_run_without_zero_is_refused_with_what_would_work(shard, tmp_path):
    folder = shard() / "deepspeed"
    for path in folder.glob("*_states.pt"):
        path.unlink()
    torch.save({}, folder / "mp_rank_00_model_states.pt")
    _refused(
        MissingInputError, folder, tmp_path / "out", "works: checkpoints of ZeRO-1, 2 or 3", config_from=folder.parent / "model"
    )


def test_files_of_another_stage_beside_them_are_refused(shard, tmp_path):
    folder = shard() / "deepspeed"
    torch.save({}, folder / "mp_rank_00_model_states.pt")
    _refused(DataError, folder, tmp_path / "out", "two runs in one folder", config_from=folder.parent / "model")


def test_rank_files_of_a_larger_run_are_refused(shard, tmp_path):
    folder, larger = shard(world_size=2) / "deepspeed", shard("larger", world_size=4) / "deepspeed"
    for path in larger.glob("zero_pp_rank_[23]_*"):
        (folder / path.name).write_bytes(path.read_bytes())
    _refused(
        DataError,
        folder,
        tmp_path / "out",
        "written by 2 ranks, but the folder holds files of 4",
        config_from=folder.parent / "model",
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_states_of_an_earlier_save_are_refused(shard, tmp_path, stage):
    def count(rank, model_state, optim_state):
        states = {"state": {0: {"step": torch.tensor(float(9 - rank))}}}
        optim_state["base_optimizer_state" if stage == 2 else "optimizer_state_dict"] = states

    _refused(DataError, shard(edit=count, stage=stage), tmp_path / "out", "after step 8.0, but", "after step 9.0: two runs")


def test_a_rank_file_of_another_step_is_refused(shard, tmp_path):
    def late(rank, model_state, optim_state):
        model_state["global_steps"] = 7 + rank

    _refused(DataError, shard(edit=late), tmp_path / "out", "of step 8, but zero_pp_rank_0_mp_rank_00_model_states.pt of step 7")


def test_optimizer_states_of_another_zero_stage_are_refused(shard, tmp_path):
    def say_two(rank, model_state, optim_state):
        optim_state["zero_stage"] = 2

    _refused(DataError, shard(edit=say_two), tmp_path / "out", "of ZeRO-2, beside model states of ZeRO-3")


class _Bomb:
    """Unpickled by plain pickle it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_wants_code_is_refused_and_not_run(shard, tmp_path):
    def plant(rank, model_state, optim_state):
        model_state["client"] = _Bomb(tmp_path / "boom") if rank == 1 else None

    folder = shard(edit=plant)
    torch.load(folder / "deepspeed" / "zero_pp_rank_1_mp_rank_00_model_states.pt", weights_only=False)
    assert (tmp_path / "boom").exists()  # it is a real one
    (tmp_path / "boom").unlink()
    _refused(UnsafeError, folder, tmp_path / "out", "zero_pp_rank_1_mp_rank_00_model_states.pt", "its pickle wants")
    assert not (tmp_path / "boom").exists()


def test_a_torn_file_is_refused(shard, tmp_path):
    folder = shard()
    path = folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-500])
    _refused(DataError, folder, tmp_path / "out", str(path), "manifest.json says")
    _refused(DataError, folder / "deepspeed", tmp_path / "out", str(path), "not a readable", config_from=folder / "model")


def test_a_manifest_that_points_outside_is_refused(shard, tmp_path):
    folder = shard()
    write_manifest(folder, {"step": 1, "files": {"../../secret": {"size": 1, "sha256": ""}}})
    _refused(UnsafeError, folder, tmp_path / "out", "../../secret")


@pytest.mark.parametrize("change", ["a figure", "its hash", "its format", "cut off"])
def test_a_manifest_that_has_changed_since_it_was_written_is_refused(shard, tmp_path, change):
    folder = shard(step=7)
    text = (folder / "manifest.json").read_text()
    own = json.loads(text)["manifest_sha256"]
    changed = {
        "a figure": text.replace('"step": 7', '"step": 6'),
        "its hash": text.replace(own, f"{int(own, 16) ^ 1:064x}"),
        "its format": text.replace('"format"', '"fOrmat"'),
        "cut off": text[: len(text) // 2],
    }[change]
    assert changed != text
    (folder / "manifest.json").write_text(changed)
    _refused(DataError, folder, tmp_path / "out", f"{folder / 'manifest.json'}: ")


def test_a_file_of_another_runs_rank_is_refused(shard, tmp_path):
    folder = shard()
    stale = folder / "deepspeed" / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    stale.write_bytes((folder / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").read_bytes())
    _refused(DataError, folder, tmp_path / "out", f"{stale}: not in manifest.json")


def test_a_run_folder_stands_for_its_newest_complete_step(shard):
    shard(step=3)
    newest = shard(step=20)
    torn = shard(step=100)
    (torn / "manifest.json").unlink()
    assert find_checkpoint(newest.parent).path == newest


def test_a_run_folder_stands_for_its_best_step_where_the_manifests_name_one(shard):
    best, last = shard(step=10), shard(step=20)
    assert find_checkpoint(best.parent).path == last
    for path, is_best in ((best, True), (last, False)):
        write_manifest(path, read_manifest(path) | {"best": is_best})
    assert find_checkpoint(best.parent).path == best
    assert find_checkpoint(last).path == last


def test_a_tag_folder_needs_a_config(shard, tmp_path):
    folder = shard() / "deepspeed"
    _refused(MissingInputError, folder, tmp_path / "out", "--config-from")
    assert consolidate(folder, tmp_path / "out", config_from=folder.parent / "model").step is None


def test_no_checkpoint_is_a_clear_finding(tmp_path):
    _refused(MissingInputError, tmp_path / "nowhere", tmp_path / "out", "no such checkpoint folder")
    (tmp_path / "empty").mkdir()
    _refused(MissingInputError, tmp_path / "empty", tmp_path / "out", "no checkpoint")


def test_an_output_that_exists_is_kept_without_force(shard, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        consolidate(shard(), out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    consolidate(tmp_path / "run", out, force=True)
    assert not (out / "precious").exists()
    assert (out / "model.safetensors").is_file()


def test_a_changed_byte_in_the_checkpoint_is_found_by_its_hash(shard):
    folder = shard()
    path = folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)
    assert [finding for finding in find_checkpoint(folder).check_hashes() if path.name in finding]


def test_aliases_give_the_values_of_the_stored_tensor(shard, weights):
    zero = open_deepspeed(shard() / "deepspeed")
    assert zero.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in zero.specs
    assert torch.equal(zero.tensor("lm_head.weight"), weights["model.embed_tokens.weight"])


def test_the_command_says_where_the_model_is_and_what_comes_next(shard, tmp_path):
    folder = shard()
    done = CliRunner().invoke(app, ["consolidate", str(folder.parent), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    last = done.output.strip().splitlines()[-1]
    assert last == f"model: {tmp_path / 'out'}   next: h3scale checkpoint verify {tmp_path / 'out'} --against {folder.parent}"


@pytest.mark.parametrize("verb", ["consolidate", "verify", "release"])
def test_help_of_each_verb_has_an_example(verb):
    done = CliRunner().invoke(app, [verb, "--help"])
    assert f"Example: h3scale checkpoint {verb}" in done.output


def test_the_command_line_is_ready_without_torch():
    code = "import sys, h3scale.cli.checkpoint; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("100", 100), ("2 KB", 2000)])
def test_sizes_are_read_as_people_write_them(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="works: 5GB"):
        parse_size(text)
