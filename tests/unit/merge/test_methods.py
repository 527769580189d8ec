"""Each method against fp64 oracles that are written plainly (oracle.py), cases worked by hand, and what must hold for any input."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from h3scale.config.merge import OPTIONS
from h3scale.merge.delta import LowRank, Site, dense
from h3scale.merge.registry import METHODS, merged_delta
from tests.unit.merge.oracle import ORACLES

SHAPES = ((12, 20), (20, 12), (16, 16))
ON_MATRICES = [name for name, method in METHODS.items() if method.on_matrices]
RANDOM = ("dare", "dare_ties", "della")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OPTIONS),
    ("slerp", {"t": 0.2}),
    ("ties", {"density": 0.7}),
    ("breadcrumbs", {"density": 0.5, "outliers": 0.1}),
    ("consensus_ta", {"consensus": 1, "mask_threshold": 1.5}),
    ("iso_cts", {"common_fraction": 0.5}),
    ("resm", {"outliers": "element", "outlier_kappa": 1.0}),
    ("resm", {"rank": "constant"}),
    ("resm", {"sparsity_threshold": 0.6, "outlier_kappa": 1.5}),
]


def num_models(method: str) -> int:
    return 2 if method == "slerp" else 3


def case(shape: tuple[int, ...], count: int, seed: int = 0, scale: float = 0.5) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    common = torch.randn(shape, generator=generator)
    return base, [scale * (common + torch.randn(shape, generator=generator).pow(3)) for _ in range(count)]


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def merge(method: str, base: Tensor, deltas: Any, site: Site | None = None, **values: Any) -> Tensor:
    return dense(merged_delta(method, base, deltas, OPTIONS[method](**values), site or Site()))


def oracle(method: str, base: Tensor, deltas: list[Tensor], **values: Any) -> Tensor:
    options = OPTIONS[method](**values)
    return ORACLES[method](base.double(), [d.double() for d in deltas], options.weights_of(len(deltas)), options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "values"), VARIANTS, ids=str)
def test_a_method_gives_what_its_paper_says_in_fp64(method: str, values: dict[str, Any], shape: tuple[int, int]) -> None:
    base, deltas = case(shape, num_models(method))
    assert far(merge(method, base, deltas, **values), oracle(method, base, deltas, **values)) < 1e-5


def test_wudi_of_few_rows_is_what_its_paper_says() -> None:
    base, deltas = case((4, 30), 3)
    deltas[1].zero_()[0] = deltas[0][0]  # and of rows that are there twice
    for values in ({}, {"weights": [0.5, 2.0, 1.0]}):
        assert far(merge("wudi", base, deltas, **values), oracle("wudi", base, deltas, **values)) < 1e-5
    deltas[2].zero_()  # nothing is asked of a model that is the base
    assert far(merge("wudi", base, deltas), oracle("wudi", base, deltas[:2])) < 1e-5


@pytest.mark.parametrize("method", [name for name in OPTIONS if name != "slerp"])
def test_weights_count(method: str) -> None:
    base, deltas = case((12, 20), 3)
    weights = [0.5, 2.0, 1.0]
    wanted = oracle(method, base, deltas, weights=weights)
    assert far(merge(method, base, deltas, weights=weights), wanted) < 1e-5
    assert far(merge(method, base, deltas), wanted) > 1e-2


@pytest.mark.parametrize("method", ON_MATRICES)
def test_factors_give_what_their_product_gives(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [LowRank(torch.randn(24, r, generator=generator), torch.randn(r, 30, generator=generator)) for r in (2, 3, 1)]
    base = torch.randn(24, 30, generator=generator)
    found = merged_delta(method, base, factors, OPTIONS[method]())
    assert isinstance(found, LowRank)
    assert (
        far(found.dense(), oracle(method, base, [factor.left_OR.double() @ factor.right_RI.double() for factor in factors])) < 1e-4
    )


@pytest.mark.parametrize("method", OPTIONS)
def test_vectors_and_single_numbers_merge(method: str) -> None:
    for shape in ((7,), (1,), ()):
        base, deltas = case(shape, num_models(method))
        wanted = oracle("linear" if method in ON_MATRICES else method, base, deltas) if shape == (7,) else None
        found = merge(method, base, deltas)
        assert found.shape == base.shape
        if wanted is not None:
            assert far(found, wanted) < 1e-5 or not wanted.any()


# By hand: two models whose deltas are diag(3, 1) and diag(2, -4).
BASE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
DELTAS = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, -4.0]))]
BY_HAND: list[tuple[str, dict[str, Any], list[float]]] = [
    ("linear", {}, [2.5, -1.5]),
    ("linear", {"weights": [3, 1]}, [2.75, -0.25]),
    ("task_arithmetic", {}, [5, -3]),
    ("task_arithmetic", {"weights": [1, -1], "scaling": 2}, [2, 10]),
    ("ties", {"density": 1.0}, [2.5, -4]),  # the second entry's sum is negative: the second model alone agrees
    ("ties", {"density": 0.25}, [3, -4]),  # one entry of each is left
    ("consensus_ta", {"mask_threshold": 1.0}, [0, 0]),  # 3 > |2| but not 2 > |3|; 4 > |1| but not 1 > |4|
    ("consensus_ta", {"mask_threshold": 0.5}, [5, 0]),
    ("breadcrumbs", {"density": 0.25, "outliers": 0.25}, [2, 1]),  # neither the largest nor the zeros
    ("tsv_m", {}, [3, -4]),  # one triplet each, and those are orthogonal already
    ("iso_c", {}, [4, -4]),  # singular values 5 and 3
    ("wudi", {}, [(27 / 10 + 8 / 20) / (9 / 10 + 4 / 20), (1 / 10 - 64 / 20) / (1 / 10 + 16 / 20)]),
]


@pytest.mark.parametrize(("method", "values", "wanted"), BY_HAND, ids=str)
def test_two_models_by_hand(method: str, values: dict[str, Any], wanted: list[float]) -> None:
    torch.testing.assert_close(
        merge(method, BASE, DELTAS, **values), torch.diag(torch.tensor(wanted, dtype=torch.float32)), atol=1e-5, rtol=1e-6
    )


def test_model_stock_by_hand() -> None:
    base, deltas = torch.zeros(2), [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    cosine = 0.5**0.5
    share = 2 * cosine / (1 + cosine)
    torch.testing.assert_close(merge("model_stock", base, deltas), share * torch.tensor([1.0, 0.5]))


def test_slerp_by_hand_stays_on_the_circle() -> None:
    base, deltas = torch.zeros(2), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    for t in (0.0, 0.3, 1.0):
        angle = torch.tensor(t * torch.pi / 2)
        torch.testing.assert_close(merge("slerp", base, deltas, t=t), torch.stack([angle.cos(), angle.sin()]))


# Law 11 and its neighbours.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", ["none", "model"])
def test_resm_with_equal_weights_and_constant_rank_is_tsv_m_bit_for_bit(shape: tuple[int, int], outliers: str) -> None:
    base, deltas = case(shape, 3)
    values: dict[str, Any] = {"outliers": outliers, "outlier_kappa": 1e9, "rank": "constant"}
    assert torch.equal(merge("resm", base, deltas, **values), merge("tsv_m", base, deltas))


@pytest.mark.parametrize("outliers", ["model", "element"])
def test_resm_counts_entries_of_sparse_models_as_its_definition(outliers: str) -> None:
    base, deltas = case((12, 20), 3)
    for model, delta in enumerate(deltas):  # models of unlike sparsity, with zeros that never count
        delta[delta.abs() < 0.3 * (model + 1)] = 0
    values: dict[str, Any] = {"outliers": outliers, "sparsity_threshold": 0.0, "outlier_kappa": 1.0}
    found = merge("resm", base, deltas, **values)
    assert far(found, oracle("resm", base, deltas, **values)) < 1e-5
    assert far(found, merge("resm", base, deltas, **{**values, "rank": "constant"})) > 1e-2


def test_resm_gives_equally_sparse_models_the_ranks_of_tsv_m() -> None:
    base, (delta, *_) = case((12, 20), 1)
    deltas = [delta, delta.flip(0), delta.flip(1)]
    found = merge("resm", base, deltas, outliers="none", rank="sparsity")
    assert torch.equal(found, merge("tsv_m", base, deltas))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "method", ["tsv_m", "resm", "wudi", "ties", "task_arithmetic", "linear", "model_stock", "breadcrumbs", "dare"]
)
def test_one_model_at_full_rank_and_density_is_returned(method: str, shape: tuple[int, int]) -> None:
    base, deltas = case(shape, 1)
    values: dict[str, Any] = {"density": 1.0} if "density" in OPTIONS[method].model_fields else {}
    values |= {"outliers": 0.0} if method == "breadcrumbs" else {"sparsity_threshold": 0.0} if method == "resm" else {}
    assert far(merge(method, base, deltas, **values), deltas[0]) < 1e-6


@pytest.mark.parametrize("method", OPTIONS)
def test_scale_zero_returns_the_base(method: str) -> None:
    base, deltas = case((12, 20), num_models(method))
    assert torch.equal(base + merge(method, base, deltas, scaling=0.0), base)


@pytest.mark.parametrize("method", OPTIONS)
def test_twice_the_scale_is_twice_the_change(method: str) -> None:
    base, deltas = case((12, 20), num_models(method))
    assert far(merge(method, base, deltas, scaling=2.0), 2 * merge(method, base, deltas)) < 1e-6


@pytest.mark.parametrize("method", OPTIONS)
def test_deltas_of_zero_change_nothing(method: str) -> None:
    base, deltas = case((12, 20), num_models(method))
    zeros = [torch.zeros_like(delta) for delta in deltas]
    assert far(base + merge(method, base, zeros), base) < 1e-6
    if method in ON_MATRICES:
        empty = [LowRank(torch.zeros(12, 0), torch.zeros(0, 20)) for _ in deltas]
        assert not merge(method, base, empty).any()


@pytest.mark.parametrize("method", ON_MATRICES)
def test_a_model_that_is_the_base_does_not_disturb(method: str) -> None:
    base, (one, other) = case((12, 20), 2)
    found = merge(method, base, [one, other, torch.zeros_like(one)])
    if method == "wudi":
        assert far(found, oracle(method, base, [one, other])) < 1e-5
    elif method == "resm":
        assert found.isfinite().all()
    else:
        assert far(found, oracle(method, base, [one, other, torch.zeros_like(one)])) < 1e-5


@pytest.mark.parametrize("method", [name for name in OPTIONS if name not in RANDOM])
def test_the_order_of_the_models_does_not_matter(method: str) -> None:
    base, deltas = case((12, 20), num_models(method))
    wanted = merge(method, base, deltas)
    for order in itertools.permutations(range(len(deltas))):
        assert far(merge(method, base, [deltas[i] for i in order]), wanted) < 1e-5


@pytest.mark.parametrize("method", RANDOM)
def test_the_order_of_named_models_does_not_matter(method: str) -> None:
    base, deltas = case((12, 20), 3)
    wanted = merge(method, base, deltas, Site("w", ("a", "b", "c")))
    found = merge(method, base, [deltas[2], deltas[0], deltas[1]], Site("w", ("c", "a", "b")))
    assert far(found, wanted) < 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock", "wudi", "slerp"])
def test_equal_models_give_that_model(method: str) -> None:
    base, (delta,) = case((12, 20), 1)
    values: dict[str, Any] = {"density": 1.0} if method == "ties" else {}
    assert far(merge(method, base, [delta] * num_models(method), **values), delta) < 1e-5


@pytest.mark.parametrize("num_models", [2, 3, 5])
@pytest.mark.parametrize("common_fraction", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_iso_cts_has_room_for_every_share_of_common_directions(common_fraction: float, num_models: int) -> None:
    base, deltas = case((8, 20), num_models)
    found = merge("iso_cts", base, deltas, common_fraction=common_fraction)
    assert far(found, oracle("iso_cts", base, deltas, common_fraction=common_fraction)) < 1e-5


def test_equal_models_leave_tsv_m_their_share_of_the_rank() -> None:
    base, (delta,) = case((12, 20), 1)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    k = 12 // 3
    assert far(merge("tsv_m", base, [delta] * 3), u[:, :k] * s[:k] @ v[:k]) < 1e-6


@pytest.mark.parametrize("method", RANDOM)
def test_what_is_dropped_depends_on_seed_tensor_and_model(method: str) -> None:
    base, deltas = case((12, 20), 3)
    site = Site("w", ("a", "b", "c"))
    found = merge(method, base, deltas, site, seed=1)
    assert torch.equal(found, merge(method, base, deltas, site, seed=1))
    assert not torch.equal(found, merge(method, base, deltas, site, seed=2))
    assert not torch.equal(found, merge(method, base, deltas, Site("v", site.models), seed=1))
    assert not torch.equal(found, merge(method, base, deltas, Site("w", ("a", "b", "d")), seed=1))


@pytest.mark.parametrize("method", ["dare", "della", "dare_ties"])
def test_random_drops_keep_a_sum_on_average(method: str) -> None:
    base = torch.zeros(40, 50)
    delta = torch.rand(40, 50) + 0.5
    draws = [merge(method, base, [delta], seed=seed, density=0.5) for seed in range(200)]
    if method == "dare":
        assert float(torch.stack(draws).mean() / delta.mean()) == pytest.approx(1, abs=0.02)
    shares = torch.stack([(draw != 0).float().mean() for draw in draws])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)


def test_breadcrumbs_does_not_empty_a_small_tensor() -> None:
    base, deltas = case((5, 10), 2)
    values: dict[str, Any] = {"density": 0.5, "outliers": 0.01}  # 1% of 50 entries is none
    assert merge("breadcrumbs", base, deltas, **values).count_nonzero() > 25


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.on_matrices])
def test_rows_alone_give_the_rows_of_the_whole(method: str) -> None:
    base, deltas = case((12, 20), num_models(method))
    chosen, options, models = METHODS[method], OPTIONS[method](), ("a", "b", "c")
    from h3scale.merge.delta import Whole

    weights = options.weights_of(len(deltas))
    facts = chosen.survey(Whole(base, deltas), options, weights) if chosen.survey else None
    whole = merge(method, base, deltas, Site("w", models))
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        site = Site("w", models, start * 20, facts)
        rows = merge(method, base[start:stop], [delta[start:stop] for delta in deltas], site)
        assert torch.equal(rows, whole[start:stop])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000), st.sampled_from(ON_MATRICES))
def test_no_shape_breaks_a_method_on_matrices(rows: int, columns: int, count: int, seed: int, method: str) -> None:
    base, deltas = case((rows, columns), count, seed)
    found = merge(method, base, deltas)
    assert found.shape == base.shape
    assert found.isfinite().all()
