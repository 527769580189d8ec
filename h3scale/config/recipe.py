"""Recipes: what people write to say what a run shall be. Sparse YAML; DeepSpeed's own knobs live in ds_configs/."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic import Strict as Strict_

from h3scale.config.data import Data, Sources
from h3scale.config.strict import Strict

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]

DenseFamily = Literal["llama", "mistral", "qwen3"]
ExpertCompute = Literal["auto", "loop", "grouped_mm", "megablocks", "megablocks_grouped"]  # model.expert_compute
Group = Literal["experts", "router", "ffn", "attention", "norms", "embeddings"]  # of parameters, see model.trainable


class Architecture(Strict):
    """Sizes of a dense Llama that starts from random weights; the vocabulary is the tokenizer's."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    @model_validator(mode="after")
    def _heads(self) -> Self:
        heads, shared = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size: {self.hidden_size} must be a multiple of 2 x num_attention_heads = {2 * heads}")
        if heads % shared:
            raise ValueError(f"num_key_value_heads: {shared} must divide num_attention_heads = {heads}")
        return self


class Optimizer(Strict):
    """AdamW with warm-up, then the schedule down to `final_share` of the learning rate.

    wsd (warm-up, stable, decay) keeps the peak until the last `decay_share` of the steps and falls in a line: what it
    did before the decay does not depend on how long the run is.
    """

    learning_rate: float = Field(gt=0)
    # Of single groups; 0 keeps a group as it is, in a checkpoint that can be written (frozen experts cannot, under ZeRO-3).
    learning_rates: dict[Group | Literal["lora"], NotNegative] = Field(default_factory=dict)
    betas: Annotated[tuple[float, float], Strict_(False)] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    warmup_share: Share = 0.05
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_share: Share = 0.2  # of wsd
    final_share: Share = 0.1
    clip_norm: float = Field(default=1.0, gt=0)


class Lora(Strict):
    """LoRA: frozen matrices get updates of low rank, which are merged into them in what the run leaves behind.

    For memory and traffic: an update has rank x (in + out) parameters with optimizer state, its matrix in x out. Experts are
    stacked tensors under AutoEP and have no LoRA there; `ffn` is for dense models.
    """

    rank: Positive = 8
    alpha: float = Field(default=16.0, gt=0)  # the update counts alpha / rank times
    targets: list[Literal["attention", "ffn"]] = Field(default=["attention"], min_length=1)
    dropout: Share = 0.0  # of the update's input; above 0 the losses of a run depend on how it is split into ranks


class RouterLoss(Strict):
    """The gating loss: negative log-probability of the record's alignment, per layer, times `loss_weight`.

    `vote`: the tokens that count. `both` is the default: at inference the router has to be right from the first token on.
    """

    loss_weight: NotNegative = 0.1
    # Of logsumexp(logits)^2, which keeps logits small enough for bf16 (ST-MoE takes 1e-3). 0: the router loss alone does not
    # let them grow in short runs; `router_z` in the metrics says whether they do.
    z_weight: NotNegative = 0.0
    # Of even load among the experts of one alignment (Switch takes 1e-2). 0, and refused, where an alignment has one expert:
    # load between alignments is given by the data and the router loss.
    balance_weight: NotNegative = 0.0
    vote: Literal["prompt", "response", "both"] = "both"


class Drift(Strict):
    """Holds experts near where they started: gamma times the squared relative distance, averaged over the layers.

    `gamma` for all experts, `gammas` for some by alignment (`general` for the general experts).
    `kind`: `weights` is the distance of an expert's matrices, which costs next to nothing. `activations` is the distance of its
    outputs on the tokens it is given: what cannot be seen in them is free. It makes the experts about one and a half times as
    slow, so `weights` is the default.
    """

    kind: Literal["weights", "activations"] = "weights"
    gamma: NotNegative = 0.0
    gammas: dict[str, NotNegative] = Field(default_factory=dict)


class Guards(Strict):
    """What is watched while a run goes on, and what it is not let do."""

    # Takes the largest micro-batch through forward and backward before step 0, so that a run that does not fit says so in
    # its first minute and not in the night. It costs the time of two micro-batches and changes nothing.
    dry_run: bool = True
    # A step whose loss or gradient is not finite is left out. One such batch is bad luck or bad data; after five different ones
    # in a row the weights or the learning rate are at fault, and the rest of the run would be computed for nothing.
    max_skipped_in_a_row: Positive = 5
    # Warns where lm is so many standard deviations above the mean of the last 100 steps. Batches are balanced by alignment, so
    # their losses differ little: of normal noise six hits once in a billion steps.
    spike_sigmas: float = Field(default=6.0, gt=0)
    # Warns where an expert gets less than this share of an even share of the tokens for so many steps on end. A tenth is
    # far from any uneven mixture that one trains on, and 50 steps outlast a phase in which a router looks for its way.
    collapse_share: Share = 0.1
    collapse_steps: Positive = 50


class Evaluation(Strict):
    """Held-out records, scored while the run goes on: NLL per target token and router accuracy by alignment.

    Every rank takes its share. The training is the same with and without it, bit for bit.
    """

    records: Sources  # of every alignment that the run trains
    every: Positive  # steps; the end of the run is always scored
    at_start: bool = False  # also before step 1
    records_per_alignment: Positive | None = None  # the first so many of each; null is all of them
    # What the run leaves is the step with the lowest NLL, and the last step beside it. The mean over the alignments decides, each
    # counting the same: over the tokens, the alignment with the longest answers would decide alone. Each new best is a checkpoint
    # on disk; the one before goes when it is complete.
    keep_best: bool = False


class Save(Strict):
    """Training checkpoints on the way, which a run goes on from after a signal, a crash or the end of its time.

    A signal saves at once, whatever is said here; `every` bounds what a crash costs.
    """

    # Steps; null: only when asked (a signal, a file SAVE). As many as take a quarter of an hour to an hour: a GPU of a large
    # cluster fails every few hours, and a save takes a minute.
    every: Positive | None = None
    # So many of the newest stay, two at least: one that is damaged on disk must not be the only one.
    keep: Annotated[int, Field(ge=2)] = 2
    # When the disk refuses a checkpoint that `every` asks for: stop (exit code 74, the checkpoint before stays), because each step
    # from there on would be lost by the next crash; or go_on, said each time, for a disk that is soon as it was (a shared quota).
    on_error: Literal["stop", "go_on"] = "stop"
    # The checkpoints that `every` asks for: the ranks copy what they have to memory, train on, and write the copy meanwhile; the
    # next save waits for it. Costs memory, a rank's part of a checkpoint on its host (written at once where that is not free), and
    # a crash meanwhile takes the run back one checkpoint further: worth it where the disk is slow beside a step.
    background: bool = False


class Tracking(Strict):
    """Who is told each step's figures, beside metrics.jsonl, which is always written. A tracker that fails is switched off.

    TensorBoard by default: files in the run's folder, no account. wandb and trackio get the name of a project and must be
    installed by whoever asks for them; their own settings come from the environment (WANDB_MODE, TRACKIO_SPACE_ID, ...),
    which is where keys belong: the recipe is sent with the run.
    """

    tensorboard: bool = True
    wandb: str | None = None
    trackio: str | None = None
    live: bool = True  # the view on rank 0's terminal; false: one line that moves (for screen readers and recordings)
    # MFU is of this, for a device that h3scale does not know by name; without it the peak is measured by a matrix product.
    peak_tflops: float | None = Field(default=None, gt=0)


class TrainRecipe(Strict):
    """One training run: a base from random weights, one alignment (`alignment` set), or a fused model."""

    model: str | None = None  # a model folder; None with init: random
    # What dense family the model is, or was fused from. Read by model=tiny alone, which has no folder to see it in.
    family: DenseFamily | None = None
    init: Literal["model", "random"] = "model"
    architecture: Architecture | None = None  # with init: random
    tokenizer: str | None = None  # with init: random
    out: str
    seed: int = 0
    alignment: str | None = None
    data: Data
    steps: Positive
    rows_per_micro_batch: Positive = 4
    trainable: list[Literal["all"] | Group] = Field(default_factory=list)  # nothing, where `lora` is all that is trained
    lora: Lora | None = None
    optimizer: Optimizer
    router: RouterLoss = RouterLoss()
    drift: Drift = Drift()
    guards: Guards = Guards()
    evaluation: Evaluation | None = None
    save: Save = Save()
    tracking: Tracking = Tracking()
    # The kernels that compute experts. auto takes torch's grouped GEMM on Hopper and later and a loop elsewhere; all give the same
    # but for rounding. megablocks (block-sparse) and megablocks_grouped need `make megablocks`. A dense model has no use for it.
    experts: ExpertCompute = "auto"
    # Keeps a block's input alone and computes the rest again in backward: a third more time for much less memory.
    activation_checkpointing: bool = False
    deepspeed: str
    # Ranks that share one set of experts; best: the largest that divides the experts and the ranks of a node.
    ep_size: Positive | Literal["best"] = 1
    # How long a rank waits for the others in a collective before it gives up (exit 69; NCCL's watchdog aborts the process).
    # Longer than the slowest thing that one rank does alone: writing its part of a checkpoint to a shared disk.
    collective_timeout_s: Positive = 1800
    ranks: Positive = 1  # processes that `h3scale train` starts on this machine; a launcher's own count wins

    @model_validator(mode="after")
    def _start(self) -> Self:
        if self.init == "random" and (self.architecture is None or self.tokenizer is None):
            raise ValueError("init: random needs `architecture` and `tokenizer`")
        if self.init == "random" and self.model is not None:
            raise ValueError("init: random and `model` exclude each other (works: one of them)")
        if self.init == "model" and self.model is None:
            raise ValueError("`model` is required (a model folder), or init: random")
        return self

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if not self.trainable and self.lora is None:
            raise ValueError("`trainable` is required (such as [experts, router]), or `lora`")
        both = sorted({"all", *(self.lora.targets if self.lora else [])} & set(self.trainable)) if self.lora else []
        if both:
            raise ValueError(f"trainable: {', '.join(both)} and lora exclude each other (a matrix is tuned whole or by an update)")
        return self

    @model_validator(mode="after")
    def _batch(self) -> Self:
        if self.data.rows_per_batch % self.rows_per_micro_batch:
            rows = self.data.rows_per_batch
            works = [str(d) for d in range(1, rows + 1) if rows % d == 0]
            raise ValueError(
                f"rows_per_micro_batch: {self.rows_per_micro_batch} does not divide data.rows_per_batch = {rows} "
                f"(works: {', '.join(works)})"
            )
        return self


class TokenizerRecipe(Strict):
    """A SentencePiece tokenizer trained on records and written as a Hugging Face fast tokenizer with a chat template."""

    records: Sources
    vocab_size: Positive
    character_coverage: Share = 0.9995
    out: str
