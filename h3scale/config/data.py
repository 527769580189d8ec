"""The `data` part of a recipe: where records come from, what is left out, and how they become global batches."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from h3scale.config.strict import Strict

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0)]


class Source(Strict):
    """Records that need more than a path: a public data set in its own fields, or rows that do not name their alignment."""

    path: str = Field(description="A file, a folder of files, or hub:OWNER/NAME[/FOLDER] for a data set of the Hugging Face hub.")
    adapter: str | None = Field(
        default=None, description="Whose fields these are (h3scale data adapters lists them); a hub name that has one needs none."
    )
    alignment: str | None = Field(default=None, description="For rows that do not name theirs.")
    split: str = Field(
        default="train", description="Of a hub data set; one with an adapter has its usual split unless this is given."
    )
    part: Literal["train", "heldout"] | None = Field(
        default=None, description="One side of the adapter's own cut, for sets that come without a train and a test part."
    )


def _with_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SourceList = list[Annotated[Source, BeforeValidator(_with_path)]]  # a text is a path
Sources = Annotated[SourceList, Field(min_length=1)]


class Hygiene(Strict):
    """What is left out of the training records. Everything left out is written down in the prepared store."""

    exact_duplicates: bool = Field(
        default=True, description="Drop a record whose prompt and response another has, within and across."
    )
    near_duplicates: float | None = Field(
        default=0.85,
        gt=0,
        le=1,
        description="Drop a record as similar as this to an earlier one (Jaccard similarity of word triples, by MinHash); "
        "null keeps them. 0.85 drops copies with a few words changed and keeps answers that share a template.",
    )
    heldout: list[str] = Field(
        default=[], description="Evaluation files: training records whose prompt is in them, or nearly so, are left out."
    )
    heldout_similarity: float = Field(
        default=0.7, gt=0, le=1, description="Jaccard similarity of the words of two prompts from which they count as the same."
    )


class Phase(Strict):
    """Weights from a step on."""

    from_step: int = Field(ge=0)
    weights: dict[str, Weight]


class Data(Strict):
    """Which records, and how they become global batches of `rows_per_batch` rows of `sequence_length` tokens.

    Every batch holds the alignments' shares in real tokens. The shares are equal unless `weights`, a `temperature`
    over the sizes (share ~ tokens ** (1 / temperature); 1 is the sizes as they are) or a `schedule` says otherwise.
    """

    records: Sources
    alignments: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which there are, in label order; a record of another is bad. None: the model's, or what the records name.",
    )
    prepared: str | None = Field(
        default=None, description="Folder of the prepared stores; None is `prepared` beside the recipe's `out`."
    )
    workers: Positive | None = Field(default=None, description="Processes that prepare; None is one a core.")
    bad_records: Literal["drop", "stop"] = Field(
        default="drop", description="stop is what --strict sets: one bad record is an error."
    )
    max_bad: Share = Field(default=0.01, description="With drop: more bad records than this share is an error all the same.")
    hygiene: Hygiene = Hygiene()
    sequence_length: Positive = 256
    rows_per_batch: Positive = 16  # over all ranks, so it does not change with the cluster
    packing: Literal["mixed", "separate"] = Field(
        default="mixed",
        description="mixed: every row holds the alignments in their shares, so every micro-batch of every rank does. "
        "separate: one alignment a row; shares hold to within a row in every micro-batch.",
    )
    weights: dict[str, Weight] | None = None
    temperature: float | None = Field(default=None, gt=0)
    schedule: list[Phase] | None = Field(
        default=None, min_length=1, description="Other weights from a step on, the first from step 0."
    )
    max_epochs: Epochs | dict[str, Epochs] | None = Field(
        default=None, description="How often an alignment's records may repeat; then its share goes to the others. None: no limit."
    )
    prompt_weight: Share = Field(
        default=0.0,
        description="How much a prompt's token counts in the LM loss beside a response's 1. 0 trains on answers only; a base "
        "that has to learn to read needs a little, 1 is plain text.",
    )

    @model_validator(mode="after")
    def _shares(self) -> Self:
        given = [key for key in ("weights", "temperature", "schedule") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other (works: one of them)")
        phases = self.schedule or ([Phase(from_step=0, weights=self.weights)] if self.weights is not None else [])
        for phase in phases:
            if sum(phase.weights.values()) <= 0:
                raise ValueError(f"weights: {phase.weights} sum to 0 (works: at least one above 0)")
        steps = [phase.from_step for phase in phases]
        if phases and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"schedule: from_step {steps} (works: 0 first, then growing)")
        return self
