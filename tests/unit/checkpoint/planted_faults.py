"""Faults to plant in a sound model folder or training checkpoint: each changes one thing on disk.

FOLDER and TRAINING say of each: what plants it, the severity it must be found with, and words that must be in the line.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.checkpoint.receipt import RECEIPT
from h3scale.checkpoint.shard_files import INDEX, WEIGHTS, header_of
from h3scale.checkpoint.shards import read_json

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(read_json(path) | values))


def _edit(folder: Path, change) -> None:
    """Changes tensors, each in its shard; the headers stay as they are."""
    tensors = {name: values for path in shards(folder) for name, values in load_file(path).items()}
    change(tensors)
    for path in shards(folder):
        save_file({name: tensors[name] for name in load_file(path) if name in tensors}, path, metadata={"format": "pt"})


def _edit_header(path: Path, change) -> None:
    """Changes the text of a header, in its length; the values stay."""
    header = header_of(path)
    text = change(header[8:].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[len(header) :])


def _weight_map(folder: Path, **files) -> None:
    index = read_json(folder / INDEX)
    edit_json(folder / INDEX, weight_map=index["weight_map"] | {name.replace("__", "."): file for name, file in files.items()})


def _first(folder: Path) -> str:
    return next(iter(read_json(folder / INDEX)["weight_map"]))


def flipped_byte(folder):
    values = bytearray(shards(folder)[1].read_bytes())
    values[-20] ^= 1
    shards(folder)[1].write_bytes(values)


def truncated_file(folder):
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 8)


def grown_file(folder):
    with shards(folder)[0].open("ab") as file:
        file.write(b"\0" * 16)


def empty_file(folder):
    shards(folder)[0].write_bytes(b"")


def endless_header(folder):
    path = shards(folder)[0]
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def sparse_header(folder):
    with shards(folder)[0].open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)


def no_text(folder):
    _edit_bytes = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(_edit_bytes[:9] + b"\xff\xfe" + _edit_bytes[11:])


def overlap(folder):
    def lie(text):
        entries = json.loads(text)
        one, other = [name for name in entries if entries[name].get("shape") == [20, 16]][:2]
        entries[other]["data_offsets"] = entries[one]["data_offsets"]
        return json.dumps(entries)

    _edit_header(_with(folder, [20, 16]), lie)


def hole(folder):
    _edit_header(shards(folder)[0], lambda text: json.dumps(_without_first(json.loads(text))))


def _without_first(entries):
    first = min((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    return {name: entry for name, entry in entries.items() if name != first}


def _with(folder, shape):
    """A shard with two tensors of a shape."""
    return next(path for path in shards(folder) if sum(list(v.shape) == shape for v in load_file(path).values()) > 1)


def huge_shape(folder):
    path = _with(folder, [20, 16])
    _edit_header(path, lambda text: text.replace("[20,16]", "[4294967296,4294967296]", 1))


def header_names_a_tensor_twice(folder):
    def twice(text):
        name, entry = next((name, entry) for name, entry in json.loads(text).items() if name != "__metadata__")
        return text.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}"

    _edit_header(shards(folder)[0], twice)


def tensor_named_like_a_path(folder):
    name = next(name for name in load_file(shards(folder)[0]))
    _edit_header(shards(folder)[0], lambda text: text.replace(name, "../../evil"))


def missing_shard(folder):
    shards(folder)[1].unlink()


def extra_shard(folder):
    shutil.copy(shards(folder)[0], folder / "model-00099-of-00099.safetensors")


def stale_index(folder):
    save_file({"a": torch.ones(1)}, folder / WEIGHTS)


def one_tensor_in_two_shards(folder):
    one, two = shards(folder)[:2]
    name = next(iter(load_file(one)))
    save_file(load_file(two) | {name: load_file(one)[name]}, two)


def index_says_another_shard(folder):
    index = read_json(folder / INDEX)["weight_map"]
    name = _first(folder)
    other = next(file for file in index.values() if file != index[name])
    edit_json(folder / INDEX, weight_map=index | {name: other})


def index_omits_a_tensor(folder):
    index = read_json(folder / INDEX)["weight_map"]
    edit_json(folder / INDEX, weight_map={name: file for name, file in index.items() if name != _first(folder)})


def index_has_a_ghost(folder):
    _weight_map(folder, ghost=shards(folder)[0].name)


def index_total_size(folder):
    edit_json(folder / INDEX, metadata={"total_size": 1})


def index_has_a_key_twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.rstrip()[:-1] + ', "weight_map": {}}')


def config_has_a_key_twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.rstrip()[:-1] + ', "vocab_size": 12}')


def index_leads_up(folder):
    _weight_map(folder, ghost="../model.safetensors")


def index_is_absolute(folder):
    _weight_map(folder, ghost="/etc/passwd")


def index_has_a_nul(folder):
    _weight_map(folder, ghost="model\0.safetensors")


def index_has_a_backslash(folder):
    _weight_map(folder, ghost="..\\model.safetensors")


def shard_is_a_link_outside(folder):
    path = shards(folder)[0]
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def tokenizer_is_a_link_outside(folder):
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


def sums_lead_outside(folder):
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../secret\n")


def receipt_leads_outside(folder):
    receipt = read_json(folder / RECEIPT)
    edit_json(folder / RECEIPT, files=receipt["files"] | {"../secret": {"sha256": ""}})


def swapped_experts(folder):
    def swap(tensors):
        for part in ("w1", "w2", "w3"):
            for layer in (0, 1):
                one, other = EXPERT.format(layer, 1, part), EXPERT.format(layer, 3, part)
                tensors[one], tensors[other] = tensors[other], tensors[one]

    _edit(folder, swap)


def swapped_gate_and_up(folder):
    def swap(tensors):
        one, other = EXPERT.format(1, 2, "w1"), EXPERT.format(1, 2, "w3")
        tensors[one], tensors[other] = tensors[other], tensors[one]

    _edit(folder, swap)


def expert_over_another(folder):
    def copy(tensors):
        for part in ("w1", "w2", "w3"):
            tensors[EXPERT.format(0, 1, part)] = tensors[EXPERT.format(0, 0, part)].clone()

    _edit(folder, copy)


def wrong_dtype(folder):
    edit_json(folder / "config.json", dtype="bfloat16")


def wrong_vocab_size(folder):
    edit_json(folder / "config.json", vocab_size=40)


def wrong_number_of_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**12)


def special_token_outside(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[2, 33])


def tokenizer_of_another_model(folder):
    from tests.unit.checkpoint.conftest import save_tokenizer

    save_tokenizer(folder, more=("one-too-many",))


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def not_a_number(folder):
    _edit(folder, lambda tensors: tensors[QUERY].view(-1).__setitem__(7, float("nan")))


def infinite(folder):
    _edit(folder, lambda tensors: tensors[QUERY].view(-1).__setitem__(7, float("-inf")))


def all_zeros(folder):
    _edit(folder, lambda tensors: tensors[QUERY].zero_())


def missing_expert(folder):
    _edit(folder, lambda tensors: [tensors.pop(EXPERT.format(1, 3, part)) for part in ("w1", "w2", "w3")])
    index = read_json(folder / INDEX)["weight_map"]
    edit_json(folder / INDEX, weight_map={name: file for name, file in index.items() if "1.block_sparse_moe.experts.3" not in name})


def tied_weights_that_differ(folder):
    tensors = {"lm_head.weight": load_file(_holds(folder, "model.embed_tokens.weight"))["model.embed_tokens.weight"] + 1}
    save_file(tensors, folder / "model-00098-of-00099.safetensors")
    _weight_map(folder, lm_head__weight="model-00098-of-00099.safetensors")


def _holds(folder, name):
    return folder / read_json(folder / INDEX)["weight_map"][name]


def hostile_pickle(folder):
    torch.save({"a": Payload(folder.parent / "witness")}, folder / "pytorch_model.bin")


def bare_pickle(folder):
    (folder / "model.pkl").write_bytes(pickle.dumps({"a": 1}))


def metadata_of_dcp(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(folder.parent / "witness")))


def old_pickle_called_bin(folder):
    (folder / "training.bin").write_bytes(pickle.dumps(Payload(folder.parent / "witness"), protocol=0))


def remote_code(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def code_beside_the_model(folder):
    (folder / "modeling_evil.py").write_text("import os\n")


def _template(text):
    def plant(folder):
        (folder / "chat_template.jinja").write_text(text)

    return plant


def template_in_the_tokenizers_config(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "tools", "template": "{{ ''.__class__.__mro__ }}"}])


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
GROWS = "{{ 'a' * 10**9 }}"
LONG = "{{ 'a' * 10**6 }}"

# name: (what plants it, severity, words of the finding)
FOLDER = {
    "a flipped byte, by the receipt": (flipped_byte, "error", f"sha256 differs from {RECEIPT} in "),
    "a truncated file": (truncated_file, "error", "cut off"),
    "a file with more at its end": (grown_file, "error", "16 bytes after the last tensor belong to none"),
    "an empty file": (empty_file, "error", "cut off, or no safetensors file (0 bytes"),
    "a header of 2^63 bytes": (endless_header, "error", "cut off, or no safetensors file"),
    "a header of 200 MB": (sparse_header, "error", "a header of 200000000 bytes"),
    "a header that is no text": (no_text, "error", "its header is no JSON"),
    "tensors that overlap": (overlap, "error", "overlap"),
    "bytes of no tensor": (hole, "error", "belong to no tensor"),
    "a shape that overflows": (huge_shape, "error", "says of"),
    "a name twice in a header": (header_names_a_tensor_twice, "error", "twice (a duplicate)"),
    "a tensor that is called a path": (tensor_named_like_a_path, "unsafe", "'../../evil', which is a path"),
    "a missing shard": (missing_shard, "error", f"named in {INDEX}, but missing"),
    "an extra shard": (extra_shard, "error", f"model-00099-of-00099.safetensors: is not in {INDEX}"),
    "a stale index": (stale_index, "error", "transformers would load it instead"),
    "a tensor in two shards": (one_tensor_in_two_shards, "error", "(a duplicate)"),
    "an index that is wrong": (index_says_another_shard, "error", ", but it is in model-"),
    "an index without a tensor": (index_omits_a_tensor, "error", "does not name "),
    "an index with a ghost": (index_has_a_ghost, "error", "'ghost' is in the index but in no shard"),
    "a wrong total_size": (index_total_size, "error", "total_size is 1, the tensors have"),
    "a key twice in the index": (index_has_a_key_twice, "error", "the key 'weight_map' is there twice"),
    "a key twice in the config": (config_has_a_key_twice, "error", "the key 'vocab_size' is there twice"),
    "an index that leads up": (index_leads_up, "unsafe", "'../model.safetensors', outside the folder"),
    "an absolute path in the index": (index_is_absolute, "unsafe", "'/etc/passwd', outside the folder"),
    "a NUL in the index": (index_has_a_nul, "unsafe", "outside the folder"),
    "a backslash in the index": (index_has_a_backslash, "unsafe", "outside the folder"),
    "a shard that is a link": (shard_is_a_link_outside, "unsafe", "a link that leads outside the folder"),
    "a tokenizer that is a link": (tokenizer_is_a_link_outside, "unsafe", "tokenizer.json: a link that leads outside"),
    "sums that lead outside": (sums_lead_outside, "unsafe", "SHA256SUMS:1: names '../secret', outside the folder"),
    "a receipt that leads outside": (receipt_leads_outside, "unsafe", "'../secret', outside the folder"),
    "swapped experts, by the receipt": (swapped_experts, "error", "experts 1 and 3 are swapped in layers 0, 1"),
    "swapped w1 and w3, by the receipt": (swapped_gate_and_up, "error", "w1 and w3 of expert 2 are swapped in layer 1"),
    "an expert over another": (expert_over_another, "error", "expert 1 holds the weights of expert 0 in layer 0"),
    "a wrong dtype": (wrong_dtype, "error", "dtype: bfloat16, but the tensors are float32"),
    "a wrong vocabulary": (wrong_vocab_size, "error", "model.embed_tokens.weight is (33, 16), config.json asks for (40, 16)"),
    "layers without end": (wrong_number_of_layers, "error", "num_hidden_layers: 1000000000000"),
    "a special token outside": (special_token_outside, "error", "eos_token_id: 33 is outside the vocabulary of 33"),
    "a tokenizer that is too large": (tokenizer_of_another_model, "error", "the tokenizer has 34 tokens (largest id 33)"),
    "a broken tokenizer": (broken_tokenizer, "error", "transformers cannot load the tokenizer"),
    "a NaN": (not_a_number, "error", f"{QUERY} has 1 values that are NaN or infinite"),
    "an infinity": (infinite, "error", f"{QUERY} has 1 values that are NaN or infinite"),
    "a tensor of zeros": (all_zeros, "error", f"{QUERY} is all zeros"),
    "a missing expert": (missing_expert, "error", f"{EXPERT.format(1, 3, 'w2')} (16, 20) is missing"),
    "tied weights that differ": (tied_weights_that_differ, "error", "are tied (tie_word_embeddings), but differ"),
    "a hostile pickle": (hostile_pickle, "unsafe", "its pickle wants"),
    "a bare pickle": (bare_pickle, "unsafe", "model.pkl: a bare pickle"),
    "torch DCP's metadata": (metadata_of_dcp, "unsafe", ".metadata: a bare pickle"),
    "an old pickle": (old_pickle_called_bin, "unsafe", "training.bin: "),
    "remote code": (remote_code, "unsafe", "auto_map asks loaders to run code"),
    "code beside the model": (code_beside_the_model, "unsafe", "modeling_evil.py: code beside a model"),
    "a template that loops": (_template(LOOPS), "unsafe", "within 2 s of processor time"),
    "a template that grows": (_template(GROWS), "unsafe", "needs more than 512 MiB of memory"),
    "a template that is long": (_template(LONG), "unsafe", "writes 1000000 characters"),
    "a template that escapes": (template_in_the_tokenizers_config, "unsafe", "chat_template tools: wants what the sandbox forbids"),
    "a template that changes its input": (_template("{{ messages.append(1) }}"), "unsafe", "wants what the sandbox forbids"),
    "a template that includes": (_template("{% include '/etc/passwd' %}"), "error", "cannot write a conversation"),
    "a template that is broken": (_template("{% for %}"), "error", "is no template (line 1"),
    "a template that writes nothing": (_template("{# nothing #}"), "error", "writes nothing"),
}


def _rank(folder: Path, rank: int, kind: str) -> Path:
    return folder / "deepspeed" / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"


def stale_rank_file(folder):
    shutil.copy(_rank(folder, 1, "optim"), _rank(folder, 2, "optim"))


def stale_rank(folder):
    for kind in ("model", "optim"):
        shutil.copy(_rank(folder, 1, kind), _rank(folder, 2, kind))


def missing_rank_file(folder):
    _rank(folder, 1, "optim").unlink()


def flipped_byte_of_a_rank(folder):
    values = bytearray(_rank(folder, 1, "optim").read_bytes())
    values[len(values) // 2] ^= 1
    _rank(folder, 1, "optim").write_bytes(values)


def hostile_rank_file(folder):
    torch.save({"a": Payload(folder.parent / "witness")}, _rank(folder, 0, "model"))


def sparse_rank_file(folder):
    os.truncate(_rank(folder, 0, "optim"), 1 << 40)


def manifest_leads_outside(folder):
    manifest = read_manifest(folder)
    write_manifest(folder, manifest | {"files": manifest["files"] | {"../../secret": {"size": 1, "sha256": ""}}})


def changed_manifest(folder):
    edit_json(folder / "manifest.json", step=1)


def experts_of_another_config(folder):
    edit_json(folder / "model" / "config.json", num_local_experts=5)


TRAINING = {
    "a stale rank file": (stale_rank_file, "error", "is not in manifest.json: of another run"),
    "a stale rank": (stale_rank, "error", "written by 2 ranks, but the folder holds files of 3: two runs in one folder"),
    "a missing rank file": (missing_rank_file, "error", "in manifest.json, but missing"),
    "the states of a rank": (missing_rank_file, "error", "the optim states of rank 1 are missing"),
    "a flipped byte": (flipped_byte_of_a_rank, "error", "sha256 differs from manifest.json"),
    "a hostile rank file": (hostile_rank_file, "unsafe", "its pickle wants"),
    "a rank file of 1 TB": (sparse_rank_file, "error", "1099511627776 bytes, manifest.json says"),
    "a manifest that leads outside": (manifest_leads_outside, "unsafe", "outside the checkpoint"),
    "a changed manifest": (changed_manifest, "error", "manifest.json: sha256 differs from its own"),
    "another number of experts": (experts_of_another_config, "error", "config.json asks for (5, 20, 16)"),
}
