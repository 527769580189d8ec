"""transformers' own FSDP2 with expert parallelism as an oracle: what it saves is the model that it was given, by our readers."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.verify import examine
from h3scale.model.families import MOE_FAMILIES
from tests.distributed.forked import launch
from tests.unit.checkpoint.layouts_reference import save_layout, tiny_moe

RANKS, EP_SIZE = 4, 2  # two ranks have the same experts, and parts of them


def _save(folder: Path) -> None:
    """On every rank: loads each family's hub folder over the ranks, and saves it gathered and as torch DCP's shards."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for family in MOE_FAMILIES:
        spread = DistributedConfig(fsdp_size=RANKS, ep_size=EP_SIZE)
        model = AutoModelForCausalLM.from_pretrained(folder / family / "hub", dtype=torch.float32, distributed_config=spread)
        assert next(p for n, p in model.named_parameters() if "gate_up" in n).to_local().shape[0] == 1  # of four experts
        model.save_pretrained(folder / family / "gathered")
        model.save_pretrained(folder / family / "shards", distributed_checkpoint=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    for family in MOE_FAMILIES:
        save_layout(folder / family / "hub", tiny_moe(family, experts=4), "hub")
    launch("FSDP2 and EP", RANKS, _save, folder)
    return folder


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_what_transformers_gathers_from_its_ranks_is_the_model(saved, family):
    report = examine(saved / family / "gathered", saved / family / "hub", logits=True)
    assert report.errors == []
    assert report.num_equal_tensors == len(load_file(saved / family / "hub" / "model.safetensors"))
    assert report.max_abs_difference == 0.0


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_shards_that_torch_consolidates_convert_to_the_bytes_of_the_hub(saved, family, tmp_path):
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    shards, whole = saved / family / "shards", tmp_path / "whole"
    whole.mkdir()
    names = load_file(next(shards.glob("*.safetensors")))
    consolidate_safetensors_files(str(shards), str(whole), dict.fromkeys(names, 1))
    shutil.copy(shards / "config.json", whole)
    assert examine(whole, saved / family / "hub").errors == []
    convert(whole, tmp_path / "hub", to="hub")
    ours, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hub", saved / family / "hub"))
    assert {name: values.numpy().tobytes() for name, values in ours.items()} == {
        name: values.numpy().tobytes() for name, values in given.items()
    }
