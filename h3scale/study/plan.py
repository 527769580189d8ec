"""A study as a row of ordinary commands, each with what it needs, what it makes and how much work it is. No torch.

Everything lies in the study's folder, where the commands run: `data` (train and held-out), `split` (of the training records: to
train on, and to choose scalings on), `tokenizer`, and a folder a seed with `models`, `checkpoints`, `search`, `explain` and
`scores`. A task that makes a model has the model's name.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h3scale.config.base import load_recipe
from h3scale.config.fuse import FuseRecipe
from h3scale.config.merge import OPTIONS
from h3scale.config.recipe import TokenizerRecipe, TrainRecipe
from h3scale.config.study import Fusion, StudyRecipe, options_of
from h3scale.errors import ConfigError
from h3scale.study.scored import Scored
from h3scale.study.tasks import ENSEMBLE, FUSION, MERGE, MIXTURE, RESM, SEARCHED, SINGLE, Model, Plan, Task

TRAIN, VALIDATION, TEST = "split/train.jsonl", "split/heldout.jsonl", "data/heldout.jsonl"
SEEDS_APART = 100  # between the seeds of a recipe in two seeds of a study
SHARED = ("split", "tokenizer")  # tasks that every seed begins with
WHOLE = "_whole"


def plan_study(recipe: StudyRecipe) -> Plan:
    """The tasks of a study. ConfigError (78) with what is wrong in the recipes it names, MissingInputError (66) without them."""
    scored = Scored.of(recipe)
    tasks = _shared(recipe, scored)
    seeds = [_Seed(recipe, scored, seed) for seed in recipe.seeds]
    models: list[Model] = []
    for seed in seeds:
        tasks += seed.tasks()
        models = seed.models
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"study: two models are called {', '.join(twice)} (works: another name for the fusion or the RESM)")
    unknown = sorted({name for pair in recipe.compare for name in pair} - set(names))
    if unknown:
        raise ConfigError(f"compare: {', '.join(unknown)}: no such model in this study (works: {', '.join(names)})")
    variants = [(f"resm_{name}", "resm") for name in recipe.resm if "resm" in names]
    return Plan(tasks, models, [*((one, other) for one, other in recipe.compare), *variants])


def _shared(recipe: StudyRecipe, scored: Scored) -> list[Task]:
    share, seed = scored.split or (None, 0)
    files: tuple[Path, ...] = ()
    if recipe.data is None:
        data = ["h3scale", "data", "builtin", "data"]
    else:
        folder = Path(recipe.data).resolve()
        named = f"--alignments={','.join(recipe.alignments)}"
        data = ["h3scale", "data", "split", str(folder), "data", named]
        data += [] if share is None else [f"--heldout-share={share:g}", f"--seed={seed}"]
        files = tuple(folder / f"{a}.jsonl" for a in recipe.alignments)
    split = ["h3scale", "data", "split", "data/train.jsonl", "split", f"--alignments={','.join(recipe.alignments)}"]
    split += [f"--heldout-share={recipe.validation_share:g}", f"--seed={seed + 1}"]  # by the first's there is nothing more
    path = recipe.path("tokenizer")
    load_recipe(TokenizerRecipe, path)
    words = [path, f"records=[{TRAIN}]", "out=tokenizer"]
    kept = "Data: what scalings are chosen on is kept from training"
    trained = ["h3scale", "data", "tokenizer", *words]
    return [
        Task("data", "Data: train and held-out records", data, ("data",), "data", files=files, is_cost=False),
        Task("split", kept, split, ("split",), "data", needs=("data",), is_cost=False),
        Task(
            "tokenizer",
            "Tokenizer: on the training records",
            trained,
            ("tokenizer",),
            "tokenizer",
            needs=("split",),
            recipe=path,
            is_cost=False,
        ),
    ]


@dataclass
class _Seed:
    """The tasks of one seed; `models` are what they make."""

    recipe: StudyRecipe
    scored: Scored
    seed: int
    models: list[Model] = field(default_factory=list)
    made: list[Task] = field(default_factory=list)

    def tasks(self) -> list[Task]:
        self._singles()
        for mixture in self.recipe.mixtures:
            self._mixture(mixture)
        for method in self.recipe.merges:
            self._merges(method)
        for name, words in self.recipe.resm.items():
            options_of("resm", words, f"resm.{name}")
            self._merge(f"resm_{name}", RESM, "resm", self.recipe.alignments, words)
        for name, fusion in self.recipe.fusions.items():
            self._fusion(name, fusion)
        self._explain()
        for group in dict.fromkeys(model.group for model in self.models):
            self._evaluate(group)
        if self.recipe.ensemble:
            self._ensemble()
        return self.made

    def _singles(self) -> None:
        self._train("base", SINGLE, "base", "Base: a small model from random weights", [], "tokenizer=tokenizer", is_cost=False)
        kinds = {fusion.aligned for fusion in self.recipe.fusions.values()}
        for kind in ("ffn", "whole"):
            for alignment in self.recipe.alignments if kind == "ffn" or kind in kinds else ():
                words = [
                    f"model={self._model('base')}",
                    f"alignment={alignment}",
                    *(["trainable=[all]"] if kind == "whole" else []),
                ]
                name = alignment + (WHOLE if kind == "whole" else "")
                what = "with all its weights" if kind == "whole" else "FFNs tuned"
                self._train(name, SINGLE, "align", f"Align: {alignment}, {what}", ["base"], *words)

    def _mixture(self, kind: str) -> None:
        steps = load_recipe(TrainRecipe, self.recipe.path("mixture")).steps
        alignments = self.recipe.alignments
        if kind == "pairs":
            for pair in self.recipe.pairs:
                weights = {name: int(name in pair) for name in alignments}
                self._mix("mixture_" + "_".join(pair), f"Mixture: {' and '.join(pair)} alone", f"data.weights={_flow(weights)}")
            return
        parts = [{"from_step": at * steps // len(alignments), "weights": {n: int(n == name) for n in alignments}}
                 for at, name in enumerate(alignments)]  # fmt: skip
        shares = {
            "full": ("all records, by their sizes", "data.temperature=1"),
            "balanced": ("all records, in equal shares", f"data.weights={_flow(dict.fromkeys(alignments, 1))}"),
            "ordered": (", then ".join(alignments), f"data.schedule={_flow(parts)}"),
        }
        why, word = shares[kind]
        self._mix(f"mixture_{kind}", f"Mixture: {why}", word)

    def _mix(self, name: str, why: str, word: str) -> None:
        self._train(name, MIXTURE, "mixture", why, ["base"], f"model={self._model('base')}", word)

    def _merges(self, method: str) -> None:
        sets = (
            {"_" + "_".join(pair): pair for pair in self.recipe.pairs} if method == "slerp" else {"": tuple(self.recipe.alignments)}
        )
        drawn = [f"seed={self.seed}"] if "seed" in OPTIONS[method].model_fields else []
        for suffix, parents in sets.items():
            self._merge(method + suffix, MERGE, method, parents, drawn)
            if method in self.recipe.searched:
                self._merge(f"{method}{suffix}_searched", SEARCHED, method, parents, drawn)

    def _merge(self, name: str, group: str, method: str, parents: Sequence[str], options: Sequence[str]) -> None:
        out, found = self._model(name), self._at(f"search/{name}")
        words = [*map(self._model, parents), "--base", self._model("base"), "--method", method, "--out", out, *options]
        needs = ["base", *parents]
        search = self.recipe.search
        if group != SEARCHED or search is None:
            self._add(name, f"Merge: {name.replace('_', ' ')}", ["h3scale", "merge", *words], (out,), MERGE, needs=needs)
        else:
            words += ["--search", found, "--records", VALIDATION, "--budget", str(search.budget)]
            words += ["--records-per-alignment", str(search.records_per_alignment)]
            words += [word for text in self.scored.excluded for word in ("--exclude-source", text)]
            why = f"Merge: {name.replace('_searched', '').replace('_', ' ')}, its scaling chosen on validation records"
            self._add(name, why, ["h3scale", "merge", *words], (out, found), SEARCHED, search.budget, needs)
        self.models.append(Model(name, group))

    def _fusion(self, name: str, fusion: Fusion) -> None:
        path, suffix = self.recipe.path("fuse"), WHOLE if fusion.aligned == "whole" else ""
        parents = {alignment: self._model(alignment + suffix) for alignment in self.recipe.alignments}
        start = self._model(name) if fusion.train is None else self._at(f"starts/{name}")
        words = [f"base={self._model('base')}", f"models={_flow(parents)}", f"out={start}", f"router.records=[{TRAIN}]"]
        words += [f"router.heldout_records=[{VALIDATION}]", f"router.seed={self.seed}", *fusion.fuse]
        load_recipe(FuseRecipe, path, words)
        fused = name if fusion.train is None else f"{name}.fuse"
        shown = name.replace("_", " ")
        needs = ["base", *(alignment + suffix for alignment in parents)]
        self._add(fused, f"Fuse: {shown}", ["h3scale", "fuse", path, *words], (start,), "fuse", needs=needs, recipe=path)
        if fusion.train is not None:
            checkpoint = self._at(f"checkpoints/{name}")
            self._run(f"{name}.train", "train", "fused", f"Train: {shown}", [fused], checkpoint, [f"model={start}", *fusion.train])
            command = ["h3scale", "checkpoint", "consolidate", checkpoint, self._model(name)]
            self._add(name, f"Consolidate: {shown}", command, (self._model(name),), "consolidate", needs=[f"{name}.train"])
        self.models.append(Model(name, FUSION))

    def _explain(self) -> None:
        words = [*map(self._model, self.recipe.alignments), "--base", self._model("base"), "--explain", self._at("explain")]
        needs = ["base", *self.recipe.alignments]
        why = "Explain: where the aligned models collide"
        self._add("explain", why, ["h3scale", "merge", *words], (self._at("explain"),), "explain", needs=needs)

    def _evaluate(self, group: str) -> None:
        names = [model.name for model in self.models if model.group == group]
        out = self._at(f"scores/{group}") + ("" if len(names) > 1 else ".json")
        command = ["h3scale", "evaluate", *map(self._model, names), *self.scored.words, "--out", out]
        self._add(f"scores/{group}", f"Evaluate: {group}", command, (out,), "evaluate", len(names), names, files=self.scored.files)

    def _ensemble(self) -> None:
        out, needs = self._at("scores/ensemble.json"), self.recipe.alignments
        command = ["h3scale", "evaluate", *map(self._model, needs), "--ensemble", *self.scored.words, "--out", out]
        why = "Evaluate: the aligned models together, the mean of their logits"
        self._add("scores/ensemble", why, command, (out,), "evaluate", len(needs), needs, files=self.scored.files)
        self.models.append(Model("ensemble", ENSEMBLE))

    def _train(self, name: str, group: str, file: str, why: str, needs: list[str], *words: str, is_cost: bool = True) -> None:
        self._run(name, file, "dense", why, needs, self._model(name), list(words), is_cost)
        self.models.append(Model(name, group))

    def _run(
        self, name: str, file: str, kind: str, why: str, needs: list[str], out: str, words: list[str], is_cost: bool = True
    ) -> None:
        """A training run; its recipe's seed and places are the study's."""
        path = self.recipe.path(file)
        written = load_recipe(TrainRecipe, path, words)
        given = [
            f"out={out}",
            f"seed={written.seed + SEEDS_APART * self.seed}",
            f"data.records=[{TRAIN}]",
            "data.prepared=prepared",
        ]
        if written.data.hygiene.heldout:  # left alone where sentences are all alike
            given.append(f"data.hygiene.heldout={_flow([TEST, VALIDATION, *self.scored.others])}")
        checked = load_recipe(TrainRecipe, path, [*given, *words])
        tokens = checked.steps * checked.data.rows_per_batch * checked.data.sequence_length
        verb = "align" if checked.alignment else "train"
        self._add(
            name,
            why,
            ["h3scale", verb, path, *given, *words],
            (out,),
            kind,
            tokens,
            needs,
            recipe=path,
            tokens=tokens,
            is_cost=is_cost,
        )

    def _add(
        self, name: str, why: str, command: list[str], makes: tuple[str, ...], kind: str, work: float = 1,
        needs: Sequence[str] = (), **more: Any,
    ) -> None:  # fmt: skip
        """A task of this seed, whose needs are tasks of this seed. All need the records and the tokenizer too."""
        all_needs = (*SHARED, *map(self._at, needs))
        why = f"{why} (seed {self.seed})" if len(self.recipe.seeds) > 1 else why
        self.made.append(Task(self._at(name), why, command, makes, kind, work, all_needs, **more))

    def _at(self, path: str) -> str:
        """The name of a task of this seed, or the place of what it makes."""
        return f"seed-{self.seed}/{path}"

    def _model(self, name: str) -> str:
        return self._at(f"models/{name}")


def _flow(value: object) -> str:
    """As YAML on one line."""
    return json.dumps(value)
