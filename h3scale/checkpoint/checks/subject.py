"""What is verified, opened once for all checks: its config, its tensors, and what they were found to hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from h3scale.checkpoint.expected import expected_shapes
from h3scale.checkpoint.extents import Computed, Stored, Weights
from h3scale.checkpoint.headers import Header, read_header
from h3scale.checkpoint.inside import leads_outside
from h3scale.checkpoint.layouts import find_layout, matrix
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint
from h3scale.errors import DataError, H3Error
from h3scale.model import names
from h3scale.model.families import num_experts
from h3scale.model.names import Origin


@dataclass
class Subject:
    """A model folder, an adapter, or a training checkpoint. `path` is where findings say they are.

    `model` is the folder of config.json and tokenizer; `reader` opens the tensors as they are stored. `digests`: a hash of
    the bytes of every tensor, once the values have been read.
    """

    path: Path
    model: Path
    reader: Callable[[], Weights]
    checkpoint: TrainingCheckpoint | None = None
    has_config: bool = True
    digests: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.model / "config.json") if self.has_config else {}

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Of every safetensors file in the folder, by the name of the file."""
        files = (path for path in sorted(self.path.glob("*.safetensors")) if path.is_file())
        return {path.name: read_header(path) for path in files if not leads_outside(self.path, path)}

    @cached_property
    def weights(self) -> Weights:
        return self.reader()

    def check_counts(self) -> None:
        """DataError (65) where the config asks for more layers or experts than can be: transformers would build them all."""
        shapes = [spec.shape for spec in self.weights.specs.values()]
        rows = max((shape[0] for shape in shapes if shape), default=0)  # a router has one for each expert
        counts = {
            "num_hidden_layers": (self.config.get("num_hidden_layers", 0), len(shapes)),
            "experts": (num_experts(self.config) or 0, rows),
        }
        for key, (count, most) in counts.items():
            if not isinstance(count, int) or not 0 <= count <= most:
                what = f"{len(shapes)} tensors of at most {rows} rows"
                raise DataError(f"{self.model / 'config.json'}: {key}: {str(count)[:40]}, but there are {what}")

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names in the hub layout and shapes of all tensors that the config asks for."""
        self.check_counts()
        return expected_shapes(self.config, self.model)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Where each of them should be, in the layout of the tensors that are there."""
        layout = find_layout(self.model_type, self.weights.specs, self.path)
        moe = names.MOE.get(self.model_type)
        return {name: names.locate(moe, layout, name) if moe and layout else Origin(name) for name in self.expected}

    @cached_property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what should be stored."""
        count = num_experts(self.config) or 0
        shapes = ((self.expected[name], origin) for name, origin in self.origins.items())
        return {of.tensor: of.place.tensor_shape(shape, count) if of.place else shape for shape, of in shapes}

    @cached_property
    def sources(self) -> Mapping[str, Stored | Computed]:
        """What every tensor is made of, by its name in the hub layout; what fits nothing has the name that it is stored under."""
        weights, found, used = self.weights, {}, set()
        for name, origin in self._origins_or_none().items():
            stored = weights.stored_name(origin.tensor)
            if stored in weights.specs and weights.specs[stored].shape == self.wanted[origin.tensor]:
                found[name] = self._source(stored, origin)
                used.add(stored)
        return found | {name: weights.source(name) for name in weights.specs if name not in used}

    def _origins_or_none(self) -> dict[str, Origin]:
        try:
            return self.origins if self.has_config else {}
        except H3Error:  # check_names says what is wrong; the values can be looked at all the same
            return {}

    def _source(self, stored: str, origin: Origin) -> Stored | Computed:
        whole = self.weights.source(stored)
        if origin.place is None or origin.expert is None or isinstance(whole, Computed):
            return whole
        return matrix(whole, origin.place, origin.expert, num_experts(self.config) or 0)
