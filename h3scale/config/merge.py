"""The recipe of `h3scale merge`: a base, models aligned from it, and how their weights become one model's.

Every method has its own options; `OPTIONS` says which. What all have: `weights`, one number a model, and `scaling`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from h3scale.config.base import apply_override, checked, find, load_yaml
from h3scale.config.strict import Strict
from h3scale.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
Density = Annotated[float, Field(gt=0, le=1)]


class Options(Strict):
    """What every method takes."""

    weights: list[float] | None = Field(
        default=None, description="One number a model, in their order; 1 each by default, so that no model counts more."
    )
    scaling: float = Field(
        1.0, description="What the merged change is multiplied by before it is added to the base; 0 gives the base."
    )

    @model_validator(mode="after")
    def _weights_are_not_nothing(self) -> "Options":
        if self.weights and not any(self.weights):
            raise ValueError(f"weights: {self.weights}: all are 0, and nothing would be merged (works: one that is not; scaling=0)")
        return self

    def weights_of(self, num_models: int) -> tuple[float, ...]:
        """The weights of so many models."""
        return tuple(self.weights) if self.weights is not None else (1.0,) * num_models


class Positive(Options):
    """Methods that divide by the sum of the weights, or of some, or rank what is weighted: no weight below 0."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> "Positive":
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"weights: {self.weights}: each 0 or more and their sum above 0 is needed by this method")
        return self


class Linear(Positive):
    """The weighted mean of the models."""


class Slerp(Options):
    """Two models, on the arc between them."""

    t: float = Field(0.5, ge=0, le=1, description="0 is the first model, 1 the second; half way is neither's.")

    @model_validator(mode="after")
    def _has_no_weights(self) -> "Slerp":
        if self.weights is not None:
            raise ValueError(f"weights: {self.weights}: slerp has none (works: t, from 0 to 1)")
        return self


class TaskArithmetic(Options):
    """The plain sum of the deltas; a weight below 0 takes a direction away."""


class Ties(Positive):
    """Trim, elect signs, mean of those that agree."""

    density: Density = Field(0.2, description="Share of each delta that is kept, the largest; the paper's 20%.")
    scope: Literal["tensor", "model"] = Field(
        "tensor",
        description="Where the largest are looked for: in each tensor, as mergekit (one pass less), or in the whole model, as "
        "the authors, where a tensor that hardly changed may lose everything.",
    )


class Random(Strict):
    """Methods that drop at random."""

    density: Density = Field(0.5, description="Share of each delta that is kept, on average; the rest is made up for by scale.")
    seed: int = Field(
        0, ge=0, description="With the names of tensor and model it says what is dropped, whatever the order of work."
    )


class Dare(Random, Options):
    """Random drop, rescaled, summed."""


class DareTies(Random, Positive):
    """Random drop, rescaled, then signs are elected as in TIES."""


class Della(Random, Positive):
    """Random drop in which larger entries stay more often."""

    window: float = Field(
        0.15, ge=0, description="Half the span of the chances to stay: density - window for a row's least to density + window."
    )

    @model_validator(mode="after")
    def _chances_are_chances(self) -> "Della":
        if not 0 < self.density - self.window <= self.density + self.window <= 1:
            room = min(self.density, 1 - self.density)
            raise ValueError(f"window: {self.window} around density {self.density} leaves 0 to 1 (works: below {room:g})")
        return self


class Breadcrumbs(Options):
    """Neither the largest nor the smallest entries."""

    density: Density = Field(0.2, description="Share of each delta that is kept, below the outliers.")
    outliers: float = Field(0.01, ge=0, lt=1, description="Share of each delta that is left out as too large; mergekit's gamma.")


class ConsensusTa(Options):
    """Entries that several models need."""

    consensus: int = Field(2, ge=1, description="Models that must need an entry: 2 leaves out what none or one alone needs.")
    mask_threshold: float = Field(
        0.4,
        ge=0,
        description="An entry is needed where |delta| exceeds this times its distance from the sum; the authors try 0.2 to 0.6.",
    )


class ModelStock(Positive):
    """The mean, drawn to the base as far as the deltas disagree."""


class Spectral(Positive):
    """Methods on matrices; vectors get the weighted mean."""

    embeddings: Literal["svd", "mean"] = Field(
        "svd", description="mean leaves the embedding and the head out: their rows are words, and they are the largest tensors."
    )


class TsvM(Spectral):
    """Equal shares of the rank, made orthogonal together."""


class IsoC(Spectral):
    """The sum with all singular values equal."""


class IsoCts(Spectral):
    """Iso-C with room for what each model alone has."""

    common_fraction: float = Field(
        0.8, ge=0, le=1, description="Share of the rank that the sum's directions get; the authors' 0.8."
    )


class Wudi(Spectral):
    """The change that interferes least with each model's own inputs."""


class Resm(Spectral):
    """TSV-M with outlier weights and sparsity-aware ranks (a reconstruction)."""

    outliers: Literal["model", "element", "none"] = Field(
        "model",
        description="model: a model's share in a layer grows with the mass of its outliers (signal). element: outliers are cut to "
        "the threshold (noise). The abstract allows both readings.",
    )
    outlier_kappa: float = Field(
        3.0, ge=0, description="An outlier is above mean + kappa standard deviations of |delta|; the usual 3."
    )
    rank: Literal["sparsity", "constant"] = Field(
        "sparsity", description="sparsity: ranks in proportion to the entries that matter; constant: rank / models, as TSV-M."
    )
    sparsity_threshold: float = Field(
        0.01, ge=0, lt=1, description="Entries below this share of the largest do not matter for the rank."
    )


OPTIONS: dict[str, type[Options]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare_ties": DareTies,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "consensus_ta": ConsensusTa,
    "model_stock": ModelStock,
    "tsv_m": TsvM,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "wudi": Wudi,
    "resm": Resm,
}
BASELESS = ("linear", "slerp")  # what they give does not depend on a base, but for a scaling, which starts from it


class MergeRecipe(Strict):
    """Models of one base become one model of the same form."""

    base: str | None = Field(
        default=None,
        description="Folder of the model that they were aligned from. linear and slerp with scaling 1 need none: the first model "
        "takes its place, and drops out of what they give.",
    )
    models: dict[str, str] = Field(
        description="name: folder of a dense model or of a PEFT LoRA adapter of the base. A list of folders will do."
    )
    method: str = Field(description=f"One of {', '.join(OPTIONS)}.")
    out: str = Field(description="Folder that is made.")
    dtype: Dtype | None = Field(
        default=None, description="float format of the weights; the base's by default. Models of unlike formats need it."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("models"), list):
            return values | {"models": named([str(path) for path in values["models"]])}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "MergeRecipe":
        if self.method not in OPTIONS:
            raise ValueError(f"method: '{self.method}' (works: {', '.join(OPTIONS)})")
        if len(self.models) < 2 or (self.method == "slerp" and len(self.models) > 2):
            works = "two" if self.method == "slerp" else "two or more"
            raise ValueError(f"models: {len(self.models)} given to {self.method} (works: {works})")
        folders: dict[Path, str] = {}
        for name, path in self.models.items():
            first = folders.setdefault(Path(path).resolve(), name)
            if first != name:
                raise ValueError(f"models.{name}: {path} is given twice, as {first} too (a weight says that a model counts more)")
        if self.base is None and self.method not in BASELESS:
            raise ValueError(f"base: is required by {self.method} (works without: {', '.join(BASELESS)})")
        return self

    @property
    def base_folder(self) -> str:
        """The base, or the first model where there is none."""
        return self.base or next(iter(self.models.values()))


def named(folders: list[str]) -> dict[str, str]:
    """Folders by the last parts of their paths, as many as tell them apart, so that their order does not change a name."""
    paths = [Path(folder).resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in paths) + 1 if paths else 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    else:
        names = [str(path) for path in paths]
    twice = [f"{name} (again)" if name in names[:i] else name for i, name in enumerate(names)]  # refused later, by its name
    return dict(zip(twice, folders, strict=True))


def load_merge(
    path: str | Path | None, values: dict[str, Any], overrides: list[str], fallback: Mapping[str, Any] = MappingProxyType({})
) -> tuple[MergeRecipe, Options]:
    """A recipe and the options of its method, from a file (if any), `values` and `key=value` over it, `fallback` below it.

    The file has both in one place. Raises ConfigError (78) with all findings.
    """
    written = {**fallback, **(load_yaml(find(path)) if path else {}), **values}
    for override in overrides:
        apply_override(written, override)
    where = str(path or "merge")
    own = {key: value for key, value in written.items() if key in MergeRecipe.model_fields}
    recipe = checked(MergeRecipe, own, where)
    options = checked(OPTIONS[recipe.method], {key: value for key, value in written.items() if key not in own}, where)
    check_weights(options, len(recipe.models), where)
    if recipe.base is None and options.scaling != 1:
        needed = f"base: is required by {recipe.method} with scaling {options.scaling:g}, which needs a place to start from"
        raise ConfigError(f"{where}: {needed} (works: --base BASE, or scaling=1)")
    return recipe, options


def check_weights(options: Options, num_models: int, where: str) -> None:
    """ConfigError (78) for another number of weights than of models."""
    if options.weights is not None and len(options.weights) != num_models:
        raise ConfigError(f"{where}: weights: {len(options.weights)} for {num_models} models (works: one each)")


def first_message(error: ValidationError) -> str:
    """What is wrong, of the first finding, with its key."""
    item = error.errors()[0]
    key = ".".join(str(part) for part in item["loc"])
    return f"{key}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": ")
