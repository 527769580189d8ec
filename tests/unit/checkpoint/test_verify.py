"""verify finds what is wrong with a model folder (law 10), and says nothing about a sound one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from h3scale.checkpoint.checks import compare
from h3scale.checkpoint.checks.logits import LOGIT_TOLERANCE
from h3scale.checkpoint.consolidate import SUMS, consolidate, write_sums
from h3scale.checkpoint.extents import bytes_of
from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.checkpoint.receipt import RECEIPT
from h3scale.checkpoint.shard_files import INDEX, header_of
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.verify import verify
from h3scale.cli.checkpoint import app
from h3scale.errors import DataError, MissingInputError
from tests.unit.checkpoint.conftest import save_tokenizer

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


@pytest.fixture
def pair(shard, tmp_path):
    """A consolidated folder and the checkpoint it is from."""
    checkpoint = shard(world_size=2, ep_size=2)
    consolidate(checkpoint, tmp_path / "out")
    return tmp_path / "out", checkpoint


def _change(folder, edit, sums="none"):
    """Edits the weights in place; the receipt is kept (`old`), removed (`none`), or checksums take its place (`new`)."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _sums(folder, sums)


def _sums(folder, sums):
    if sums != "old":
        (folder / RECEIPT).unlink()
    if sums == "new":
        write_sums(folder)


def _edit_json(path, **values):
    path.write_text(json.dumps(read_json(path) | values))


def _findings(folder, against=None):
    with pytest.raises(DataError) as caught:
        verify(folder, against)
    return caught.value.findings


def _swap(tensors, layer=0, one=0, other=1):
    for part in ("w1", "w2", "w3"):
        a, b = EXPERT.format(layer, one, part), EXPERT.format(layer, other, part)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def test_a_sound_model_passes_with_its_numbers(pair, weights):
    report = verify(*pair)
    assert report.findings == report.warnings == []
    assert report.num_tensors == report.num_equal_tensors == len(weights)
    assert report.num_parameters == sum(values.numel() for values in weights.values())
    assert report.num_proven_tensors == len(weights)
    assert report.max_abs_difference <= LOGIT_TOLERANCE
    json.dumps(report.to_dict())


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("by", [RECEIPT, SUMS])
def test_one_flipped_bit_is_found_by_the_receipt_and_by_the_sums(pair, file, by):
    _sums(pair[0], "old" if by == RECEIPT else "new")
    path = pair[0] / file
    values = bytearray(path.read_bytes())
    values[-200] ^= 1
    path.write_bytes(values)
    assert any(finding.startswith(f"{path}: sha256 differs from {by}") for finding in _findings(pair[0]))


def test_one_flipped_bit_is_found_without_sums_by_the_checkpoint(pair):
    path = pair[0] / "model.safetensors"
    values = bytearray(path.read_bytes())
    values[-200] ^= 1
    path.write_bytes(values)
    _sums(pair[0], "none")
    verify(pair[0])  # alone it cannot be seen
    (finding,) = _findings(*pair)
    assert "is not what" in finding


def test_two_swapped_experts_are_found_by_the_receipt_and_named(pair):
    path, swapped = pair[0] / "model.safetensors", load_file(pair[0] / "model.safetensors")
    _swap(swapped)
    header = header_of(path)
    entries = json.loads(header[8:])
    del entries["__metadata__"]
    ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    path.write_bytes(header + b"".join(bytes(bytes_of(swapped[name])) for name in ordered))
    assert _findings(pair[0]) == [f"{pair[0]}: experts 0 and 1 are swapped in layer 0 (by the sha256 in {RECEIPT})"]


def test_two_swapped_experts_are_found_by_the_checkpoint_and_named(pair):
    _change(pair[0], _swap)
    weights, logits = _findings(*pair)
    assert weights == f"{pair[0]}: experts 0 and 1 are swapped in layer 0 (by {pair[1]})"
    assert "logits differ from those of the trained engine by" in logits


def test_two_swapped_experts_are_found_by_the_logits_alone(pair, monkeypatch):
    _change(pair[0], _swap)
    monkeypatch.setattr(compare, "check_against", lambda *arguments: ())
    (finding,) = _findings(*pair)
    assert "logits differ from those of the trained engine by" in finding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_in_the_logits_of_the_probe_is_found(pair, dtype):
    consolidate(pair[1], pair[0], dtype=dtype, force=True)
    tensors = load_file(pair[1] / "probe.safetensors")
    tensors["logits"][0, 3, 5] = float("nan")
    save_file(tensors, pair[1] / "probe.safetensors")
    with pytest.raises(DataError, match="logits differ"):
        verify(*pair, hashes=False)


def test_a_missing_shard_is_found(shard, tmp_path):
    consolidate(shard(), tmp_path / "out", max_shard_bytes=20_000)
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    assert any(f"{gone}: in {RECEIPT}, but missing" in finding for finding in _findings(tmp_path / "out"))
    _sums(tmp_path / "out", "none")
    assert any(f"{gone}: named in {INDEX}, but missing" in finding for finding in _findings(tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_found(pair, value):
    name = "model.layers.1.self_attn.q_proj.weight"
    _change(pair[0], lambda tensors: tensors[name].view(-1).__setitem__(7, value))
    assert _findings(pair[0]) == [f"{pair[0]}: {name} has 1 values that are NaN or infinite"]


def test_missing_unknown_and_misshapen_tensors_are_found_at_once(pair):
    def edit(tensors):
        del tensors[EXPERT.format(1, 3, "w2")]
        tensors["extra"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(15)

    _change(pair[0], edit)
    assert _findings(pair[0]) == [
        f"{pair[0]}: {EXPERT.format(1, 3, 'w2')} (16, 20) is missing",
        f"{pair[0]}: extra (2,) is in no such model",
        f"{pair[0]}: model.norm.weight is (15,), config.json asks for (16,)",
    ]


def test_identical_experts_are_a_warning(pair):
    def edit(tensors):
        for part in ("w1", "w2", "w3"):
            tensors[EXPERT.format(1, 2, part)] = tensors[EXPERT.format(1, 0, part)].clone()
        tensors[EXPERT.format(0, 2, "w1")] = tensors[EXPERT.format(0, 0, "w1")].clone()  # one part alone is no twin

    _change(pair[0], edit)
    assert verify(pair[0]).warnings == [f"{pair[0]}: experts 0 and 2 have identical weights in layer 1"]


def test_copies_that_are_not_trained_yet_are_one_line_for_all_layers(pair):
    config = read_json(pair[0] / "config.json")
    config["h3scale"]["experts"] = ["helpful", "helpful", "harmless", "honest"]
    write_json(pair[0] / "config.json", config)

    def edit(tensors):
        for part in ("w1", "w2", "w3"):
            for layer in range(2):
                tensors[EXPERT.format(layer, 1, part)] = tensors[EXPERT.format(layer, 0, part)].clone()

    _change(pair[0], edit)
    assert verify(pair[0]).warnings == [
        f"{pair[0]}: experts 0 and 1 have identical weights in layers 0, 1 (copies of one FFN, which training parts)"
    ]


def test_a_tokenizer_with_too_many_words_is_found(pair):
    save_tokenizer(pair[0], more=("one-too-many",))
    _sums(pair[0], "none")
    assert "the tokenizer has 34 tokens (largest id 33), the model 33 rows" in _findings(pair[0])[0]


def test_a_tokenizer_that_was_not_trained_with_is_found(pair):
    tokenizer = read_json(pair[0] / "tokenizer.json")
    tokenizer["model"]["vocab"].update(w0=4, w1=3)  # of the right size, two words exchanged
    (pair[0] / "tokenizer.json").write_text(json.dumps(tokenizer))
    _sums(pair[0], "none")
    verify(pair[0])
    assert "tokenizer.json: is not the file that the model was trained with" in _findings(*pair)[0]


def test_a_broken_tokenizer_is_found(pair):
    (pair[0] / "tokenizer.json").write_text("{}")
    _sums(pair[0], "none")
    assert "transformers cannot load the tokenizer" in _findings(pair[0])[0]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_special_token_outside_the_vocabulary_is_found(pair, file):
    _edit_json(pair[0] / file, eos_token_id=[2, 33])
    _sums(pair[0], "none")
    assert _findings(pair[0]) == [f"{pair[0] / file}: eos_token_id: 33 is outside the vocabulary of 33"]


def test_a_model_without_tokenizer_is_warned_of(pair):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair[0] / name).unlink()
    _sums(pair[0], "none")
    assert verify(pair[0]).warnings == [f"{pair[0]}: has no tokenizer"]


def test_another_order_of_the_alignments_is_found(pair):
    experts = read_json(pair[0] / "config.json")["h3scale"]
    _edit_json(pair[0] / "config.json", h3scale=experts | {"alignments": experts["alignments"][::-1]})
    _sums(pair[0], "none")
    assert "config.json: h3scale:" in _findings(*pair)[0]


def test_a_checkpoint_that_changed_since_it_was_saved_is_found(pair):
    path = pair[1] / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)
    assert f"{path}: sha256 differs from manifest.json" in _findings(*pair)[0]


def test_a_rounded_model_passes_by_its_weights_and_tells_the_difference(pair, tmp_path):
    consolidate(pair[1], tmp_path / "rounded", dtype=torch.bfloat16)
    report = verify(tmp_path / "rounded", pair[1])
    assert report.num_equal_tensors == report.num_tensors
    assert report.max_abs_difference > LOGIT_TOLERANCE
    assert "expected, since" in report.warnings[0]


def test_a_file_that_the_sums_do_not_know_is_a_warning(pair):
    (pair[0] / "notes.txt").write_text("x")
    assert verify(pair[0]).warnings == [f"{pair[0] / 'notes.txt'}: is not in {RECEIPT}"]
    (pair[0] / "notes.txt").unlink()
    _sums(pair[0], "new")
    (pair[0] / "notes.txt").write_text("x")
    assert verify(pair[0]).warnings == [f"{pair[0] / 'notes.txt'}: is not in {SUMS}"]
    with (pair[0] / SUMS).open("a") as file:
        file.write(f"{'0' * 63}  notes.txt\n")
    assert "not a line of sha256sum" in _findings(pair[0])[0]


def test_a_folder_or_checkpoint_that_is_not_there_is_missing_input(pair, tmp_path):
    with pytest.raises(MissingInputError):
        verify(tmp_path / "nowhere")
    with pytest.raises(MissingInputError):
        verify(pair[0], tmp_path / "nowhere")


def test_a_run_without_probe_is_compared_by_its_weights(pair):
    (pair[1] / "probe.safetensors").unlink()
    manifest = read_manifest(pair[1])
    del manifest["files"]["probe.safetensors"]
    write_manifest(pair[1], manifest)
    report = verify(*pair)
    assert report.max_abs_difference is None
    assert report.num_equal_tensors == report.num_tensors
    assert "no probe.safetensors" in report.warnings[0]


def test_the_command_says_what_was_checked_and_what_comes_next(pair):
    done = CliRunner().invoke(app, ["verify", str(pair[0]), "--against", str(pair[1])])
    assert done.exit_code == 0, done.output
    assert "logits: max abs difference" in done.output
    assert done.output.strip().splitlines()[-1].startswith(f"verified: {pair[0]}   next: h3scale checkpoint release")


def test_a_copied_folder_is_still_verified(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").findings == []
