"""What merges model folders, as processes that import once and then wait: python merge_tools.py WAY.

A question is a JSON object with the folder of the models; the answer has its seconds. It runs in mergekit's
environment too, where h3scale is not.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from measure import Row
from ranks import serve, timed

OURS, MERGEKIT, FLOOR = "h3scale", "mergekit", "cp"
DENSITY = 0.2


def _ours() -> Callable[[Row], Row]:
    import torch

    from h3scale.config.merge import load_merge
    from h3scale.fusion.merge import How, merge

    torch.set_num_threads(1)

    def work(question: Row) -> Row:
        folder = Path(question["folder"])
        models = [str(folder / name) for name in question["models"]]
        values = {"base": str(folder / "base"), "models": models, "method": question["method"], "out": question["out"]}
        hashed = question.get("hashed", False)
        overrides = [f"density={DENSITY}"] if question["method"] == "ties" else []
        merge(*load_merge(None, values, overrides), how=How(workers=1, hashes=hashed, receipt=hashed, fsync=False))
        return {}

    return work


def _mergekit() -> Callable[[Row], Row]:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, write_model_card=False, quiet=True)

    def work(question: Row) -> Row:
        folder = Path(question["folder"])
        method = question["method"]
        settings = {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})
        config: Row = {"merge_method": method, "dtype": "bfloat16"}
        config["models"] = [{"model": str(folder / name), "parameters": settings} for name in question["models"]]
        if method != "linear":
            config["base_model"] = str(folder / "base")
            config["parameters"] = {"normalize": method == "ties"}
        run_merge(MergeConfiguration.model_validate(config), question["out"], options)
        return {"version": version("mergekit"), "torch": torch.__version__}

    return work


def _floor() -> Callable[[Row], Row]:
    """`cp` of the weights that the question names."""

    def work(question: Row) -> Row:
        folder = Path(question["folder"])
        Path(question["out"]).mkdir()
        for name in question["models"]:
            subprocess.run(["cp", str(folder / name / "model.safetensors"), f"{question['out']}/{name}"], check=True)
        return {}

    return work


WAYS = {OURS: _ours, MERGEKIT: _mergekit, FLOOR: _floor}


def main() -> None:
    work = WAYS[sys.argv[1]]()

    def answer(text: str) -> Row:
        question = json.loads(text)
        shutil.rmtree(question["out"], ignore_errors=True)
        return timed(lambda: work(question))

    serve(answer)


if __name__ == "__main__":
    main()
