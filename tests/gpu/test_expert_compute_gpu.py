"""Every backend of expert compute on a GPU, beside float64: the tests of the CPU, with kernels in the place of loops.

python -m pytest -m gpu tests/gpu
"""

from importlib.util import find_spec

import pytest
import torch

from h3scale.model.expert_compute import NAMES, choose
from h3scale.model.expert_compute.grouped import HOPPER, is_real
from tests.expert_case import CHOICES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

LARGE = {"experts": 3, "hidden": 512, "inner": 1408}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def backend(name: str, dtype: torch.dtype) -> object:
    if name.startswith("megablocks") and find_spec("megablocks") is None:
        pytest.skip("MegaBlocks is not installed (make megablocks)")
    if name == "megablocks" and dtype == torch.float32:
        pytest.skip("refused: stk multiplies fp32 in tf32")
    return choose(name)


@pytest.mark.parametrize("stacked", [False, True], ids=["w1 and w3", "stacked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_all_gradients_are_those_of_float64(name: str, kind: str, dtype: torch.dtype, stacked: bool) -> None:
    case = Case(CHOICES[kind], experts=3, hidden=128, inner=256, dtype=dtype, device="cuda")
    case.check(backend(name, dtype), stacked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_rows_enough_for_many_blocks_give_what_float64_gives(name: str) -> None:
    chosen = [[t % 3, (t + 1 + t // 7 % 2) % 3] for t in range(700)]
    Case(chosen, **LARGE, dtype=torch.bfloat16, device="cuda").check(backend(name, torch.bfloat16))  # type: ignore[arg-type]


def test_the_grouped_kernel_is_taken_where_torch_has_one() -> None:
    weight = torch.empty(2, 16, 24, device="cuda", dtype=torch.bfloat16)
    assert is_real(weight) == (torch.cuda.get_device_capability() >= HOPPER)
    assert not is_real(weight[:, :, :20].contiguous())
    assert not is_real(weight.float())
    assert not is_real(weight.cpu())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < HOPPER, reason="grouped GEMM is a loop here"
)
def test_nothing_waits_for_the_gpu_in_forward_and_backward() -> None:
    case = Case(CHOICES["skewed"], experts=3, hidden=128, inner=256, dtype=torch.bfloat16, device="cuda")
    *_, w1, w2, w3, _ = case.inputs()
    rows = torch.randn(96, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    counts = torch.tensor([40, 0, 56], device="cuda", dtype=torch.int32)
    weights = [weight.requires_grad_() for weight in (w1, w2, w3)]
    choose("auto")(rows, counts, *weights).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose("auto")(rows, counts, *weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
