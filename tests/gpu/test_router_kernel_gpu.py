"""The router's terms by one kernel on a GPU: what the CPU gives, in as few kernels as promised, and the same each time.

python -m pytest -m gpu tests/gpu/test_router_kernel_gpu.py
"""

import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from h3scale.config.recipe import RouterLoss
from h3scale.model.expert_compute.grouped import HOPPER
from h3scale.train.router_terms import has_triton, plain_terms
from tests.router_case import MicroBatch, RouterCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and has_triton()), reason="no GPU with Triton here"),
]

RECIPE = RouterLoss(loss_weight=0.1, z_weight=1e-3, balance_weight=1e-2)
OWNERS = [0, 1, 2, 2, None, 1, 0, None, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("num_tokens", "owners"), [(1, [0, 1]), (31, [0, 1, 2]), (8192, OWNERS)])
def test_a_gpu_gives_what_plain_torch_gives_on_the_cpu(num_tokens: int, owners: list[int | None], dtype: torch.dtype) -> None:
    from h3scale.train.router_kernel import fused_terms

    recipe = RECIPE if len(owners) > 3 else RouterLoss(loss_weight=0.1, z_weight=1e-3)
    wanted, slope = RouterCase(5, num_tokens, owners, 2, dtype, recipe).terms(plain_terms)
    found, gpu_slope = RouterCase(5, num_tokens, owners, 2, dtype, recipe, device="cuda").terms(fused_terms)
    torch.testing.assert_close(found.loss.cpu(), wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpu_slope.cpu(), slope, rtol=1e-3 if dtype is torch.float32 else 2**-7, atol=1e-6)
    for name, value in wanted.sums.items():
        torch.testing.assert_close(found.sums[name].cpu(), value.double(), rtol=1e-4, atol=1e-3)
    again, same_slope = RouterCase(5, num_tokens, owners, 2, dtype, recipe, device="cuda").terms(fused_terms)
    assert torch.equal(gpu_slope, same_slope)
    assert all(torch.equal(again.sums[name], value) for name, value in found.sums.items())


def test_a_step_is_eight_kernels_at_most() -> None:
    """At the shape of Llama-2-7B with three experts; what autograd adds for the logits' other use is not in it."""
    from h3scale.train.router_kernel import fused_terms

    case = RouterCase(32, 8192, [0, 1, 2], 1, torch.bfloat16, RouterLoss(loss_weight=0.1), device="cuda")
    leaves = [logits_TE.clone().requires_grad_() for logits_TE in case.logits_LTE]
    lm, outer = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    case.step(fused_terms, leaves, lm, outer)  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        case.step(fused_terms, leaves, lm, outer)
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print(*(f"{event.device_time:8.1f} us  {event.name}" for event in kernels), sep="\n")
    assert 0 < len(kernels) <= 8


def waits(num_layers: int, has_router: bool) -> int:
    """How often the CPU waits for the GPU in a micro-batch of a whole model."""
    micro_batch = MicroBatch("mixtral", num_layers, torch.bfloat16, device="cuda")
    micro_batch.step(has_router)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            micro_batch.step(has_router)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in told)


def test_a_whole_micro_batch_waits_no_more_for_its_router_nor_for_more_layers() -> None:
    """transformers waits on its own, once a forward, to see whether rows are packed."""
    plain, routed = waits(2, has_router=False), waits(2, has_router=True)
    assert routed == plain
    if torch.cuda.get_device_capability() >= HOPPER:  # elsewhere experts are a loop, which waits for its counts
        assert waits(8, has_router=True) == routed
