"""What a merge holds while it works: of adapters one tensor's factors, of files nothing."""

import gc
import os
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from h3scale.checkpoint.shard_files import TensorSpec, plan_shards
from h3scale.checkpoint.shards import write_json
from h3scale.fusion.parents import Parents
from h3scale.fusion.sources import AdapterSource, open_sources
from h3scale.merge.delta import LowRank
from tests.unit.fusion.merging import LABELS, TARGETS, models_for, run


def test_factors_are_held_while_their_tensor_is_worked_on_and_no_longer(place: Path) -> None:
    base, models = open_sources(str(place / "base"), {label: str(place / f"lora-{label}") for label in LABELS})
    parents = Parents(base, models, torch.device("cpu"))
    first, second, *_ = [name for name in base.specs if any(target in name for target in TARGETS)]

    def factors(name: str) -> list[LowRank]:
        found = [parents.delta(model, name) for model in range(len(LABELS))]
        return [delta for delta in found if isinstance(delta, LowRank)]

    held = [weakref.ref(delta.left_OR) for delta in factors(first)]
    gc.collect()
    assert [ref() is delta.left_OR for ref, delta in zip(held, factors(first), strict=True)] == [True] * len(LABELS)
    assert len(factors(second)) == len(LABELS)
    gc.collect()
    assert [ref() for ref in held] == [None] * len(LABELS)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_factors_are_read_once_for_all_blocks_of_a_tensor(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked: list[tuple[str, str]] = []
    factors = AdapterSource.factors

    def counted(self: AdapterSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((self.label, name))
        return factors(self, name)

    monkeypatch.setattr(AdapterSource, "factors", counted)
    run(place, tmp_path / "out", method, models_for(method, "lora-"))
    assert asked
    assert len(asked) == len(set(asked))


def test_a_file_larger_than_all_memory_is_read(tmp_path: Path) -> None:
    width = 1 << 16
    height = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (4 * width)
    [shard] = plan_shards([TensorSpec("w", (height, width), torch.float32)], 1 << 62)
    for label in ("base", "model"):
        (tmp_path / label).mkdir()
        write_json(tmp_path / label / "config.json", {})
        with (tmp_path / label / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.num_bytes)  # a hole, which takes no room on the disk
    base, models = open_sources(str(tmp_path / "base"), {"model": str(tmp_path / "model")})
    parents = Parents(base, models, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = parents.base_rows("w", height - 1, height)
        assert not parents.delta_rows(0, "w", height - 1, rows).any()
    assert tuple(rows.shape) == (1, width)


def test_values_that_begin_at_any_byte_are_read(tmp_path: Path) -> None:
    wanted = torch.arange(12, dtype=torch.float32).view(3, 4)
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {})
    [shard] = plan_shards([TensorSpec("w", (3, 4), torch.float32)], 1 << 62)
    header = shard.header[8:] + b" "  # of a length that is no multiple of a value's
    whole = len(header).to_bytes(8, "little") + header + wanted.numpy().tobytes()
    (tmp_path / "model" / shard.name).write_bytes(whole)
    base, models = open_sources(str(tmp_path / "model"), {})
    assert torch.equal(Parents(base, models, torch.device("cpu")).base_rows("w", 1, 3), wanted[1:])
