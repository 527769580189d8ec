"""The whole way as a list of ordinary commands: data, tokenizer, base, align, fuse, train, consolidate, evaluate, release."""

from dataclasses import dataclass
from pathlib import Path

from h3scale.study.demo_steps import Step

ALIGNMENTS = ("helpful", "harmless", "honest")
SINGLE = ("base", *ALIGNMENTS, "mixture")
# name of an ablation: (overrides of fuse.yaml or None, overrides of train.yaml)
ABLATIONS: dict[str, tuple[list[str] | None, list[str]]] = {
    "no_router_loss": (None, ["router.loss_weight=0"]),
    "no_drift": (None, ["drift.gamma=0"]),
    "random_router_start": (["router.init=random"], []),
}
QUICK_ABLATIONS = ("random_router_start",)  # it fuses and trains again, so it goes every way that the others go
LOADS = (
    "from transformers import AutoModelForCausalLM; "
    "m = AutoModelForCausalLM.from_pretrained('models/fused'); "
    "print(type(m).__name__, f'{m.num_parameters():,} parameters, loaded without h3scale')"
)
QUESTION = {
    False: "Passage: Emma keeps a cat, plays the drum and lives in Rome. Question: where does Tom live?",
    True: "How do I bake bread at home?",
}


@dataclass(frozen=True)
class Demo:
    """What the user chose. `data`: folder with one JSONL an alignment, None for the built-in records."""

    data: Path | None
    ranks: int
    quick: bool

    @property
    def recipes(self) -> str:
        if self.data is not None:
            return "recipes/demo-data"
        return "recipes/demo-quick" if self.quick else "recipes/demo"

    @property
    def ablations(self) -> dict[str, tuple[list[str] | None, list[str]]]:
        return {name: ABLATIONS[name] for name in QUICK_ABLATIONS} if self.quick else ABLATIONS

    def steps(self) -> list[Step]:
        """All commands, in order. Paths are relative to the demo's folder."""
        return [*self._data(), *self._dense(), *self._fused(), *self._ablations(), *self._judge()]

    def _data(self) -> list[Step]:
        if self.data is None:
            data = Step("Data: the built-in helpful, harmless and honest records", _words("h3scale data builtin data"), "data")
        else:
            command = ["h3scale", "data", "split", str(self.data.resolve()), "data"]
            data = Step("Data: split by instruction into train and held-out", command, "data")
        tokenizer = _words(f"h3scale data tokenizer {self.recipes}/tokenizer.yaml")
        return [data, Step("Tokenizer: SentencePiece on the records", tokenizer, "tokenizer")]

    def _dense(self) -> list[Step]:
        ranks = [] if self.ranks == 2 else [f"ranks={self.ranks}", "rows_per_micro_batch=1"]
        base = [*_words(f"h3scale train {self.recipes}/base.yaml"), *ranks]
        steps = [Step("Base: a tiny Llama from random weights, on the text of all records", base, "models/base")]
        for name in ALIGNMENTS:
            command = [*_words(f"h3scale align {self.recipes}/align.yaml alignment={name} out=models/{name}"), *ranks]
            steps.append(Step(f"Align: attention frozen, FFNs tuned on the {name} records", command, f"models/{name}"))
        mixture = [*_words(f"h3scale train {self.recipes}/mixture.yaml"), *ranks]
        return [*steps, Step("The fair control: the same FFNs on all records, as many tokens", mixture, "models/mixture")]

    def _fused(self) -> list[Step]:
        return [
            Step(
                "Fuse: FFNs become experts, the router starts from data",
                _words(f"h3scale fuse {self.recipes}/fuse.yaml"),
                "models/fused_init",
            ),
            Step("Train: ZeRO-3 + expert parallelism, router and drift losses", self._train("fused"), "checkpoints/fused"),
            self._consolidate("fused", "models/fused"),
            Step(
                "Verify: the consolidated model gives the trained engine's logits",
                _words("h3scale checkpoint verify models/fused --against checkpoints/fused"),
            ),
            Step("Load: plain transformers", ["python", "-c", LOADS]),
        ]

    def _ablations(self) -> list[Step]:
        steps = []
        for name, (fuse, train) in self.ablations.items():
            shown = name.replace("_", " ")
            model = "models/fused_init"
            if fuse is not None:
                model = f"ablations/{name}_init"
                command = [*_words(f"h3scale fuse {self.recipes}/fuse.yaml"), *fuse, f"out={model}"]
                steps.append(Step(f"Ablation, {shown}: fuse", command, model))
            command = self._train(f"ablations/{name}", [*train, f"model={model}"] if fuse else train)
            steps.append(Step(f"Ablation, {shown}: train", command, f"checkpoints/ablations/{name}"))
            steps.append(self._consolidate(f"ablations/{name}", f"ablations/{name}"))
        return steps

    def _judge(self) -> list[Step]:
        heldout = "--records data/heldout.jsonl"
        extra = "--exclude-source template --generate 20" if self.data else "--generate 100"
        models = " ".join(f"models/{name}" for name in (*SINGLE, "fused_init", "fused"))
        licence = "other" if self.data else "apache-2.0"  # what other records allow, their owner has to say
        ablations = " ".join(f"ablations/{name}" for name in self.ablations)
        return [
            Step(
                "Evaluate: every model on held-out records",
                _words(f"h3scale evaluate {models} {heldout} {extra} --bag-train data/train.jsonl --out evaluation"),
                "evaluation",
            ),
            Step(
                "Evaluate: the same model with a router that cannot tell",
                _words(f"h3scale evaluate models/fused {heldout} --router uniform --out ablations/uniform_router.json"),
                "ablations/uniform_router.json",
            ),
            Step(
                "Evaluate: the ablations",
                _words(f"h3scale evaluate {ablations} models/fused {heldout} --out ablations/evaluation"),
                "ablations/evaluation",
            ),
            Step("Try it: who answers?", ["h3scale", "generate", "models/fused", QUESTION[self.data is not None]]),
            Step(
                "Release: a folder fit for publication",
                _words(f"h3scale checkpoint release models/fused release --license {licence} --evaluation evaluation/fused.json"),
                "release",
            ),
            Step("Report: results.json, pictures and one page", _words("h3scale report .")),
        ]

    def _train(self, name: str, overrides: list[str] | None = None) -> list[str]:
        words = [f"--num_accelerators={self.ranks}", "--module", "h3scale.train", f"{self.recipes}/train.yaml"]
        if name != "fused":
            words.append(f"out=checkpoints/{name}")
        if self.ranks != 2:
            words += [f"ep_size={self.ranks}", "rows_per_micro_batch=1"]
        return ["deepspeed", *words, *(overrides or [])]

    def _consolidate(self, name: str, target: str) -> Step:
        why = "Consolidate: shards to a Hugging Face folder" if name == "fused" else f"{name.replace('_', ' ')}: consolidate"
        return Step(why, _words(f"h3scale checkpoint consolidate checkpoints/{name} {target}"), target)


def _words(command: str) -> list[str]:
    return command.split()
