"""A suite of evaluations: which files are scored, how, and whose alignment each score speaks of."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import Field, field_validator, model_validator

from h3scale.config.base import checked, find, load_yaml
from h3scale.config.strict import Strict
from h3scale.errors import MissingInputError

Kind = Literal["nll", "choices", "pairs"]
OWN_KEYS: Mapping[str, tuple[Kind, ...]] = MappingProxyType(
    {"heldout_share": ("nll",), "exclude_source": ("nll",), "template": ("choices", "pairs"), "where": ("choices", "pairs")}
)
PLACE = "{prompt}"
SHIPPED = {"3h": "recipes/suites/3h.yaml", "builtin": str(files("h3scale.data") / "records_builtin" / "suite.yaml")}


class Task(Strict):
    """One file and what is measured on it.

    nll: records, as `h3scale train` reads them. choices: a question, right and wrong answers, one of them the best.
    pairs: a prompt, a chosen and a rejected answer.
    """

    kind: Kind
    file: str = Field(description="JSON lines, in the folder of the suite or in that of `--data`.")
    alignment: str | None = Field(
        None, description="Whose score this is. Of records, which name their own: only those of this one are scored."
    )
    where: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="Fields and the values that a line has to have there, so that one file serves several tasks.",
    )
    limit: int | None = Field(
        None, ge=1, description="So many items at most, drawn by `seed`; the others of the file would only narrow the interval."
    )
    heldout_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Only the records that `h3scale data split` holds out at this share and the suite's seed: what was trained on "
        "gives no score.",
    )
    exclude_source: list[str] = Field(
        default_factory=list,
        description="Texts: records whose `source` has one in it, small or capital, are not scored. Of answers that many records "
        "share word for word, likelihood says how well they were learnt by heart.",
    )
    template: str | None = Field(
        None,
        description="The text before an answer, with {prompt} in it; the answer follows after a blank. Without it the tokenizer's "
        "chat template is used, as in training.",
    )

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, text: str | None) -> str | None:
        if text is not None and text.count(PLACE) != 1:
            raise ValueError(f"{PLACE} must stand in it once (works: 'Q: {PLACE}\\nA:')")
        return text

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError("must be a file inside the folder (works: a relative path without '..')")
        return name

    @model_validator(mode="after")
    def _keys_are_its_kinds(self) -> "Task":
        for key, kinds in OWN_KEYS.items():
            if getattr(self, key) and self.kind not in kinds:
                raise ValueError(f"{key}: a task of kind {self.kind} has none (works for: {', '.join(kinds)})")
        return self


class Suite(Strict):
    """`name` for tables, `seed` for all that is drawn or shuffled, `tasks` by name."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0, description="What a limit draws, the order of answers, and which records are held out.")
    tasks: dict[str, Task] = Field(min_length=1)


def find_suite(suite: str | Path) -> tuple[Path, Suite]:
    """The file of a suite, by its shipped name or its place, and what it says; MissingInputError (66), ConfigError (78)."""
    if str(suite) not in SHIPPED and not Path(suite).is_file():
        raise MissingInputError(f"suite {suite}: no such file (works: {', '.join(SHIPPED)}, or a YAML file)")
    path = find(SHIPPED.get(str(suite), suite))
    return path, checked(Suite, load_yaml(path), str(suite))
