"""Commands and plans for clusters, without a cluster."""

from pathlib import Path

import pytest

from h3scale.config.base import load_recipe
from h3scale.config.fuse import FuseRecipe
from h3scale.errors import ConfigError, MissingInputError, UsageError
from h3scale.launch import pipeline
from h3scale.launch.slurm import Size, deepspeed_command, hostfile_text, node_names, sbatch_command, sized, submit

RECIPE = "recipes/llama31_8b/train_4_nodes.yaml"
RECIPES = Path("recipes/llama31_8b")


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    path.touch()
    return path


def test_the_size_is_one_node_with_the_recipes_ranks_unless_said() -> None:
    assert sized(RECIPE, [], None, None) == Size(1, 8)
    assert sized(RECIPE, [], 4, 8) == Size(4, 8, 8)
    words = sbatch_command(RECIPE, ["steps=3"], Size(4, 8, 8), ["--time=1:00:00"])
    assert words[:5] == ["sbatch", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00"]
    assert words[-2:] == [RECIPE, "steps=3"]
    assert Path(words[5]).is_file()


def test_ranks_that_do_not_divide_the_rows_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"3 nodes x 8 ranks .*works: --nodes 1, 2, 4\)"):
        sized(RECIPE, [], 3, 8)


def test_deepspeeds_own_launcher_reads_the_hostfile(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(hostfile_text(node_names(["a", "b"], {}), 8))
    assert fetch_hostfile(str(path)) == {"a": 8, "b": 8}
    words = deepspeed_command(RECIPE, ["steps=3"], Size(2, 8), path)
    assert words == ["deepspeed", "--hostfile", str(path), "--module", "h3scale.train", RECIPE, "steps=3"]


def test_without_names_and_without_slurm_there_is_no_hostfile() -> None:
    with pytest.raises(UsageError, match="no machines are known"):
        node_names([], {})


def test_no_sbatch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingInputError, match=r"^sbatch: not on this machine"):
        submit(["sbatch"])


def test_the_pipeline_has_a_job_for_each_step_in_an_order_that_can_be_submitted(heldout: Path) -> None:
    jobs = pipeline.plan(RECIPES, heldout, Path("out"), [])
    alignments = list(load_recipe(FuseRecipe, RECIPES / "fuse.yaml").models)
    runs = [name for alignment in alignments for name in (f"align_{alignment}", f"consolidate_{alignment}")]
    assert [job.name for job in jobs] == [*runs, "fuse", "train", "consolidate_fused", "evaluate"]
    for number, job in enumerate(jobs):
        assert set(job.after) <= {earlier.name for earlier in jobs[:number]}
    assert jobs[len(runs)].after == tuple(f"consolidate_{alignment}" for alignment in alignments)


def test_what_is_there_already_is_not_made_again(tmp_path: Path, heldout: Path) -> None:
    every = pipeline.plan(RECIPES, heldout, tmp_path, [])
    (tmp_path / "models" / "helpful").mkdir(parents=True)
    (tmp_path / "checkpoints" / "harmless").mkdir(parents=True)
    left = {job.name: job.after for job in pipeline.plan(RECIPES, heldout, tmp_path, [])}
    assert {job.name for job in every} - left.keys() == {"align_helpful", "consolidate_helpful", "align_harmless"}
    assert left["consolidate_harmless"] == ()
    assert left["fuse"] == ("consolidate_harmless", "consolidate_honest")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.stpes=3"], "train.yaml: stpes: unknown key"),
        (["align.steps=many"], "align_helpful.yaml: steps: 'many'"),
        (["fuse.top_k=9"], "top_k: 9 of 4 experts"),
        (["steps=3"], "'steps=3': whose is it"),
    ],
)
def test_a_mistake_for_the_last_job_is_told_before_the_first(heldout: Path, words: list[str], line: str) -> None:
    with pytest.raises((ConfigError, UsageError), match=line.replace("?", "[?]")):
        pipeline.plan(RECIPES, heldout, Path("out"), words)


def test_a_model_that_no_zero_shards_is_not_consolidated(heldout: Path) -> None:
    names = {job.name: job for job in pipeline.plan(Path("recipes/demo"), heldout, Path("out"), [])}
    assert "consolidate_helpful" not in names
    assert names["align_helpful"].makes == Path("out/models/helpful")
