"""What a study scores its models on, from its suite: known before anything is trained. No torch."""

from dataclasses import dataclass
from pathlib import Path

from h3scale.config.study import StudyRecipe
from h3scale.config.suite import SHIPPED, find_suite
from h3scale.errors import ConfigError, MissingInputError


@dataclass(frozen=True)
class Scored:
    """What the models are scored on: the words that say so to `h3scale evaluate`, and the files that the scores depend on.

    `split`: what makes `data split` hold out those records that are scored. `others`: files that are all for scoring, whose
    prompts training keeps away from. `excluded`: sources that are not scored, and so not searched by.
    """

    words: list[str]
    files: tuple[Path, ...]
    split: tuple[float, int] | None
    others: list[str]
    excluded: list[str]

    @classmethod
    def of(cls, recipe: StudyRecipe) -> "Scored":
        """ConfigError (78) for a suite that says nothing of an alignment, MissingInputError (66) where its files are not."""
        path, suite = find_suite(recipe.suite)
        records = [task for task in suite.tasks.values() if task.kind == "nll"]
        named = {task.alignment for task in records}
        unheard = [] if None in named else [name for name in recipe.alignments if name not in named]
        if unheard:
            raise ConfigError(f"suite {recipe.suite}: no task of kind nll of {', '.join(unheard)} (a study compares by them)")
        given = recipe.suite_data or recipe.data
        folder = Path(given).resolve() if given else path.resolve().parent
        files = {name: (folder / task.file).resolve() for name, task in suite.tasks.items()}
        missing = sorted({str(file) for file in files.values() if not file.is_file()})
        if missing:
            raise MissingInputError([f"{file}: no such file (suite {recipe.suite})" for file in missing])
        trained = {(Path(recipe.data) / f"{name}.jsonl").resolve() for name in recipe.alignments} if recipe.data else set()
        shares = {task.heldout_share for name, task in suite.tasks.items() if files[name] in trained}
        if len(shares) > 1 or None in shares:
            raise ConfigError(
                f"suite {recipe.suite}: heldout_share: of the records that are trained on as well, it must be given, and once for "
                f"all (found: {', '.join(sorted(map(str, shares)))})"
            )
        words = ["--suite", recipe.suite if recipe.suite in SHIPPED else str(path.resolve())]
        words += ["--data", str(folder)] if given else []
        unique = dict.fromkeys(files.values())
        split = next(((share, suite.seed) for share in shares if share is not None), None)
        others = [str(file) for file in unique if given and file not in trained]
        excluded = list(dict.fromkeys(text for task in records for text in task.exclude_source))
        return cls(words, (path.resolve(), *unique), split, others, excluded)
