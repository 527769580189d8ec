"""Which expert belongs to which alignment: written in the model's config, and read from there only."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from h3scale.errors import DataError

CONFIG_KEY = "h3scale"
SHARED = "shared"  # beside the map: how what is no expert was merged, if it was


@dataclass(frozen=True)
class ExpertMap:
    """`alignments`: the labels in order. `experts`: for each expert its alignment, or None for a general expert."""

    alignments: tuple[str, ...]
    experts: tuple[str | None, ...]

    def __post_init__(self) -> None:
        findings = [f"expert {i}: unknown alignment '{a}'" for i, a in enumerate(self.experts) if a not in (*self.alignments, None)]
        findings += [f"alignment '{a}' has no expert" for a in self.alignments if a not in self.experts]
        if len(set(self.alignments)) != len(self.alignments):
            findings.append(f"an alignment is named twice: {list(self.alignments)}")
        if findings:
            raise DataError(findings)

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def labelled(self) -> list[int]:
        """Ids of the experts that belong to an alignment, ascending."""
        return [i for i, a in enumerate(self.experts) if a is not None]

    def experts_of(self, alignment: str) -> list[int]:
        """Ids of the experts of one alignment."""
        return [i for i, a in enumerate(self.experts) if a == alignment]

    def names(self) -> list[str]:
        """A readable name an expert, unique: 'helpful', 'general', and 'helpful 2' for a second one."""
        names: list[str] = []
        for alignment in self.experts:
            name = first = alignment or "general"
            number = 1
            # An alignment may itself be called 'helpful 2', or 'general'.
            while name in names or (name in self.alignments and name != alignment):
                number += 1
                name = f"{first} {number}"
            names.append(name)
        return names

    def find(self, name: str) -> int:
        """The id of an expert that is called as in `names`, 'helpful/2' (the second one), or by its number.

        DataError (65) for an alignment that has several experts, and for a name that none has.
        """
        names = self.names()
        if name in self.alignments and len(self.experts_of(name)) > 1:
            works = ", ".join(f"{name}/{i + 1}" for i in range(len(self.experts_of(name))))
            raise DataError(f"expert '{name}': {len(self.experts_of(name))} experts are of this alignment (works: {works})")
        if name in names:
            return names.index(name)
        alignment, _, number = name.rpartition("/")
        if alignment in self.alignments and number.isdecimal() and 1 <= int(number) <= len(self.experts_of(alignment)):
            return self.experts_of(alignment)[int(number) - 1]
        if name.isdecimal() and int(name) < self.num_experts:
            return int(name)
        raise DataError(f"expert '{name}': there is none (works: {', '.join(names)}, 0 to {self.num_experts - 1})")

    @classmethod
    def of(cls, alignments: Iterable[str], experts_per_alignment: int, general_experts: int) -> "ExpertMap":
        """As many experts of each alignment, one alignment after the other, then the general ones."""
        labels = tuple(alignments)
        labelled = [label for label in labels for _ in range(experts_per_alignment)]
        return cls(labels, (*labelled, *[None] * general_experts))

    def to_config(self) -> dict[str, Any]:
        """The entry for config.json, under the key `h3scale`."""
        return {"alignments": list(self.alignments), "experts": list(self.experts)}

    @classmethod
    def from_config(cls, config: Any) -> "ExpertMap | None":
        """Reads the map from a transformers config or a config.json dict; None for a model without one."""
        entry = config.get(CONFIG_KEY) if isinstance(config, dict) else getattr(config, CONFIG_KEY, None)
        if entry is None:
            return None
        return cls(tuple(entry["alignments"]), tuple(entry["experts"]))
