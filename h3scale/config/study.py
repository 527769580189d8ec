"""The recipe of `h3scale study`: which methods are set side by side, on which records, with which seeds."""

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from h3scale.config.base import apply_override, checked, find, load_yaml, shipped
from h3scale.config.merge import OPTIONS, Options
from h3scale.config.strict import Strict
from h3scale.errors import ConfigError

NAME = re.compile(r"[a-z][a-z0-9_]*")
MAX_VALIDATION = 64  # records an alignment: with more, a merge with a searched scaling would be a training method
Mixture = Literal["full", "balanced", "ordered", "pairs"]


class Fusion(Strict):
    """One mixture of experts: what differs from fuse.yaml and train.yaml, as `key=value`."""

    fuse: list[str] = Field(default=[], description="Overrides of fuse.yaml.")
    train: list[str] | None = Field(default=[], description="Overrides of train.yaml; null: the fusion is not trained at all.")
    aligned: Literal["ffn", "whole"] = Field(
        default="ffn",
        description="ffn: the models of align.yaml, with attention frozen. whole: aligned once more with all that they have; only "
        "then is there something to merge in the weights that experts share.",
    )


class Search(Strict):
    """Merges whose scaling, and what else decides most, is chosen on validation records (h3scale merge --search)."""

    methods: list[str] = Field(default=[], description="Which methods; none: all of `merges`.")
    budget: int = Field(default=12, ge=3, description="Merges a search may evaluate.")
    records_per_alignment: int = Field(
        default=MAX_VALIDATION, ge=2, le=MAX_VALIDATION, description="Validation records; neither trained on nor tested on."
    )


class StudyRecipe(Strict):
    """Mixtures of the data, merges and fusions of one base's aligned models, on the same held-out items."""

    recipes: str = Field(
        description="A folder with tokenizer.yaml, base.yaml, align.yaml, mixture.yaml, fuse.yaml and train.yaml. Their places "
        "(model, out, records) and seeds are the study's."
    )
    data: str | None = Field(default=None, description="Folder of one JSONL an alignment; none: the built-in records.")
    suite: str = Field(
        "builtin",
        description="What all models are evaluated on; it must have a task of kind nll for every alignment (h3scale evaluate).",
    )
    suite_data: str | None = Field(default=None, description="Folder of the suite's files; `data` where none is given.")
    alignments: list[str] = Field(default=["helpful", "harmless", "honest"], min_length=2, description="Label and expert order.")
    validation_share: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Of the training instructions, kept from training for the searches, which take records_per_alignment at most.",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0],
        min_length=1,
        description="Everything that is trained or drawn is made once for each; three say how much is chance.",
    )
    mixtures: list[Mixture] = Field(
        default=["full", "balanced", "ordered", "pairs"],
        description="One dense model on the records of all: by their sizes, in equal shares, one alignment after the other, or "
        "each pair of them. All see as many tokens as mixture.yaml says.",
    )
    merges: list[str] = Field(default=list(OPTIONS), description="Methods of h3scale merge. slerp takes two models: each pair.")
    search: Search | None = Field(default=Search(), description="null: no scaling is searched.")
    resm: dict[str, list[str]] = Field(
        default={
            "element_outliers": ["outliers=element"],
            "no_outliers": ["outliers=none"],
            "kappa_2": ["outlier_kappa=2.0"],
            "kappa_5": ["outlier_kappa=5.0"],
            "constant_rank": ["rank=constant"],
            "threshold_10": ["sparsity_threshold=0.1"],
            "scaling_half": ["scaling=0.5"],
        },
        description="RESM with something else, as `key=value`: its abstract leaves open what outliers and sparsity are.",
    )
    fusions: dict[str, Fusion] = Field(
        default={
            "fused": Fusion(),
            "untrained": Fusion(train=None),
            "no_router_loss": Fusion(train=["router.loss_weight=0"]),
            "no_drift": Fusion(train=["drift.gamma=0"]),
            "random_router": Fusion(fuse=["router.init=random"]),
            "resm_shared": Fusion(fuse=["shared=resm"], aligned="whole"),
            "average_shared": Fusion(fuse=["shared=average"], aligned="whole"),
        },
        min_length=1,
        description="Mixtures of experts by name.",
    )
    main: str = Field("fused", description="The fusion that all others are set against.")
    compare: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        default=[],
        description="What else is asked: pairs of models, the first less the second. RESM's variants are set against resm anyway.",
    )
    ensemble: bool = Field(True, description="The aligned models together, each token asked of all: what merging is cheaper than.")

    @field_validator("merges")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        unknown = [method for method in methods if method not in OPTIONS]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such method (works: {', '.join(OPTIONS)})")
        return methods

    @model_validator(mode="after")
    def _search_is_of_merges(self) -> Self:
        other = [method for method in self.searched if method not in self.merges]
        if other:
            raise ValueError(f"search.methods: {', '.join(other)} is not among merges (works: {', '.join(self.merges)})")
        return self

    @model_validator(mode="after")
    def _main_is_a_fusion(self) -> Self:
        if self.main not in self.fusions:
            raise ValueError(f"main: '{self.main}' is no fusion (works: {', '.join(self.fusions)})")
        return self

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        bad = [name for name in (*self.alignments, *self.fusions, *self.resm) if not NAME.fullmatch(name)]
        if bad:
            raise ValueError(
                f"{', '.join(map(repr, bad))}: no name of a model (works: small letters, digits and _, as in no_drift)"
            )
        for what, values in (("seeds", self.seeds), ("alignments", self.alignments), ("merges", self.merges)):
            if len(set(values)) != len(values):
                raise ValueError(f"{what}: {values}: one is given twice")
        return self

    @property
    def searched(self) -> list[str]:
        """Methods whose scaling is searched."""
        return [] if self.search is None else self.search.methods or self.merges

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two alignments."""
        return list(combinations(self.alignments, 2))

    def path(self, name: str) -> str:
        """The recipe of that name."""
        return f"{self.recipes}/{name}.yaml"


def load_study(path: str | Path, quick: bool = False, given: Mapping[str, Any] = MappingProxyType({})) -> StudyRecipe:
    """A study's recipe; `quick`: with the values of its section `quick` over it; `given` over all. ConfigError (78)."""
    values = load_yaml(find(path))
    over = values.pop("quick", None)
    if quick and not isinstance(over, dict):
        raise ConfigError(f"{path}: quick: is required by --quick (a section with the keys that it changes)")
    recipe = checked(StudyRecipe, {**values, **(over if quick and over else {}), **given}, str(path))
    for name, words in recipe.resm.items():
        options_of("resm", words, f"{path}: resm.{name}")
    return recipe.model_copy(update={"recipes": _from_anywhere(recipe.recipes)})


def _from_anywhere(folder: str) -> str:
    """A folder's name that holds in any current folder; a shipped one keeps its short name."""
    local, brought = Path(folder), shipped(Path(folder))
    if brought is not None and (not local.is_dir() or local.samefile(brought)):
        return folder
    return str(local.resolve())


def options_of(method: str, words: list[str], where: str) -> Options:
    """Options of a merging method from `key=value`. ConfigError (78) with all findings."""
    values: dict[str, Any] = {}
    for word in words:
        apply_override(values, word)
    return checked(OPTIONS[method], values, where)
