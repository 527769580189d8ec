"""The recipe of `h3scale fuse`: a base, aligned models, and how the router starts."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from h3scale.config.data import SourceList
from h3scale.config.merge import OPTIONS, Options, first_message
from h3scale.config.recipe import DenseFamily
from h3scale.config.strict import Strict


class RouterStart(Strict):
    """How the router is started before any training, and from which records."""

    init: Literal["ridge", "logistic", "prompt_mean", "random"] = Field(
        "ridge",
        description="ridge: closed form, one pass, memory independent of the number of tokens, so it is the default. "
        "logistic: a little better a token, but keeps every hidden state (tokens x layers x hidden_size x 4 bytes). "
        "prompt_mean: what mergekit does, centred. random: N(0, initializer_range), what upcycling does.",
    )
    records: SourceList = Field(
        default=[], description="Records that the router is fitted on, as a train recipe's; none for random."
    )
    records_per_alignment: int = Field(
        128,
        ge=2,
        description="Records taken of each alignment, a quarter of them for the scale. More tokens than a few times "
        "hidden_size change the fit little.",
    )
    heldout_records: SourceList = Field(
        default=[],
        description="Records to report the router's accuracy on; without them, the records that only set the scale "
        "are taken (or, for random, nothing is measured).",
    )
    max_tokens_per_record: int = Field(
        512, ge=2, description="Longer records are cut here: an alignment shows early, and attention costs are quadratic."
    )
    ridge: float = Field(
        1e-2,
        gt=0,
        description="Relative to the mean eigenvalue of the weighted Gram matrix of the hidden states, so that it means "
        "the same at every size: 1e-2 damps the directions that carry less than a hundredth of the mean variance.",
    )
    copy_noise: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Several experts of one alignment (and several general ones) start as copies, and under equal router rows "
        "would get equal gradients for ever. Their rows are moved apart by this share of the layer's mean row length, their "
        "mean staying what was fitted.",
    )
    seed: int = Field(0, ge=0, description="Of the choice of records, of what moves copies apart and of the random start.")

    @model_validator(mode="after")
    def _has_records(self) -> "RouterStart":
        if self.init != "random" and not self.records:
            raise ValueError(f"init: {self.init} needs records: [FILE.jsonl, ...] (works without: random)")
        return self


class FuseRecipe(Strict):
    """One base and its aligned models become one mixture of experts."""

    base: str = Field(description="Folder of the base model.")
    family: DenseFamily | None = Field(
        default=None, description="What the base is. Read by model=tiny alone, which has no folder to see it in."
    )
    models: dict[str, str] = Field(
        description="alignment: folder of a dense model or of a PEFT LoRA adapter of the base. The order written here is "
        "the order of labels and of experts."
    )
    out: str = Field(description="Folder that is made.")
    shared: str = Field(
        "base",
        description="Where attention, norms and embeddings come from. base is exact for models whose attention was frozen "
        "(an expert alone then equals its aligned model); average (of the aligned models) is for models tuned as a whole, and so "
        "is any merging method (docs/merge.md).",
    )
    merge: dict[str, Any] = Field(default={}, description="Options of the method that `shared` names, as in a merge recipe.")
    experts_per_alignment: int = Field(
        1,
        ge=1,
        description="Copies of each aligned FFN, which training then parts. More than one is for capacity and for nodes of "
        "8 GPUs: 3 alignments x 2 + 2 general experts are 8, which ep_size 2, 4 and 8 divide.",
    )
    general_experts: int = Field(
        1,
        ge=0,
        description="Experts after the aligned ones that are the base's FFN. One keeps what the base knows, and makes "
        "3 alignments 4 experts, which expert parallelism can divide.",
    )
    top_k: int = Field(
        2,
        ge=1,
        description="Experts a token, copies counted one by one. 2 lets the router be unsure between two alignments without "
        "losing either answer; with c experts an alignment that takes 2c, and 2 take two copies of one alignment.",
    )
    router: RouterStart

    @model_validator(mode="after")
    def _sizes_fit(self) -> "FuseRecipe":
        if len(self.models) < 2:
            raise ValueError(f"models: {len(self.models)} given (works: two or more alignments, each alignment: folder)")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: {self.top_k} of {self.num_experts} experts (works: 1 to {self.num_experts})")
        return self

    @model_validator(mode="after")
    def _shared_fits(self) -> "FuseRecipe":
        if self.shared not in ("base", "average", *OPTIONS):
            raise ValueError(f"shared: '{self.shared}' (works: base, average, {', '.join(OPTIONS)})")
        if self.merge and self.shared not in OPTIONS:
            raise ValueError(f"merge: is for a method that shared names, and shared is {self.shared}")
        if self.shared == "slerp" and len(self.models) > 2:
            raise ValueError(f"shared: slerp takes two models, and there are {len(self.models)}")
        if self.shared in OPTIONS:
            self._check_weights(self.shared_options)
        return self

    def _check_weights(self, options: Options) -> None:
        if options.weights is not None and len(options.weights) != len(self.models):
            raise ValueError(f"merge.weights: {len(options.weights)} for {len(self.models)} models (works: one each)")

    @property
    def shared_options(self) -> Options:
        """The options of the merging method that `shared` names."""
        try:
            return OPTIONS[self.shared].model_validate(self.merge)
        except ValidationError as error:
            raise ValueError(f"merge.{first_message(error)}") from None

    @property
    def num_experts(self) -> int:
        return len(self.models) * self.experts_per_alignment + self.general_experts
