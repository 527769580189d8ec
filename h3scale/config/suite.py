"""A suite of evaluations: which files are scored, how, and whose alignment each score speaks of."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field, field_validator, model_validator

from h3scale.config.strict import Strict

Kind = Literal["nll", "choices", "pairs"]
OWN_KEYS: Mapping[str, tuple[Kind, ...]] = MappingProxyType({"heldout_share": ("nll",), "template": ("choices", "pairs")})
PLACE = "{prompt}"


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
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key}: a task of kind {self.kind} has none (works for: {', '.join(kinds)})")
        if self.kind == "nll" and self.where:
            raise ValueError("where: a task of kind nll has none (works for: choices, pairs)")
        return self


class Suite(Strict):
    """`name` for tables, `seed` for all that is drawn or shuffled, `tasks` by name."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0, description="What a limit draws, the order of answers, and which records are held out.")
    tasks: dict[str, Task] = Field(min_length=1)
