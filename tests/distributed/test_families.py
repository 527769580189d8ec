"""Every dense family the whole way: fused with copies, trained by DeepSpeed with its experts spread, consolidated, proven."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml

from h3scale.checkpoint.checks.logits import LOGIT_TOLERANCE
from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.checkpoint.verify import verify
from h3scale.config.fuse import FuseRecipe
from h3scale.fusion.execute import fuse
from h3scale.launch.local import rank_command, run_ranks
from h3scale.model.experts import ExpertMap
from h3scale.model.families import FAMILIES
from h3scale.model.names import MOE, match
from tests.tiny import DENSE_FAMILIES, tiny_aligned, tiny_dense, tiny_records

pytestmark = pytest.mark.distributed

LABELS = ("helpful", "harmless", "honest")
STEPS = 4


def fused(folder: Path, family: str, records: Path) -> Path:
    """Three alignments with two experts each, and two general ones: eight, as for a node of eight GPUs."""
    base = tiny_dense(family, folder / "base", tie_word_embeddings=True)
    models = {label: str(tiny_aligned(folder / label, base, seed=i + 1)) for i, label in enumerate(LABELS)}
    recipe = {
        "base": str(base),
        "models": models,
        "out": str(folder / "fused"),
        "experts_per_alignment": 2,
        "general_experts": 2,
        "top_k": 4,
        "router": {"records": [str(records)]},
    }
    return fuse(FuseRecipe.model_validate(recipe)).out


def trained(folder: Path, model: Path, records: Path) -> Path:
    recipe = {
        "model": str(model),
        "out": str(folder / "run"),
        "data": {
            "records": [str(records)],
            "sequence_length": 48,
            "rows_per_batch": 8,
            "hygiene": {"exact_duplicates": False, "near_duplicates": None},
        },
        "steps": STEPS,
        "rows_per_micro_batch": 2,
        "ep_size": 2,
        "trainable": ["experts", "router"],
        "optimizer": {"learning_rate": 1e-2},
        "deepspeed": "ds_configs/cpu_debug.json",
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run_ranks(rank_command("h3scale.train", [str(path)]), 2) == 0
    return folder / "run"


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_fused_trained_and_consolidated_it_computes_what_the_engine_did(tmp_path: Path, family: str) -> None:
    records = tiny_records(tmp_path / "records.jsonl", LABELS, per_alignment=40)
    start = fused(tmp_path, family, records)
    run = trained(tmp_path, start, records)
    consolidate(run, tmp_path / "model")
    report = verify(tmp_path / "model", against=run)
    assert report.max_abs_difference is not None
    assert report.max_abs_difference <= LOGIT_TOLERANCE
    assert report.warnings == []  # among them: two experts with identical weights

    config = read_json(tmp_path / "model" / "config.json")
    expert_map = ExpertMap.from_config(config)
    assert expert_map is not None
    assert (config["architectures"], config[FAMILIES[family].experts_key]) == (
        [FAMILIES[family].architecture],
        expert_map.num_experts,
    )
    before, after = ModelFolder(start), ModelFolder(tmp_path / "model")
    assert before.files.keys() == after.files.keys()
    names = MOE[config["model_type"]]
    templates = (names.hub_router, *names.hub_experts.values())
    for name in before.files:
        moved = any(match(template, name) for template in templates)
        assert torch.equal(before.tensor(name), after.tensor(name)) != moved, name

    for template in names.hub_experts.values():
        for alignment in (*LABELS, None):
            copies = [expert for expert, own in enumerate(expert_map.experts) if own == alignment]
            for one, other in combinations(copies, 2):
                first, second = (template.format(layer=1, expert=expert) for expert in (one, other))
                assert torch.equal(before.tensor(first), before.tensor(second))
                assert not torch.equal(after.tensor(first), after.tensor(second))
