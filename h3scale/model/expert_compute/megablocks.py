"""MegaBlocks' dropless experts with its own kernels: block-sparse products (stk), or grouped GEMMs.

MegaBlocks pins an old torch and is installed without its pins (`make megablocks`); it is imported when a recipe asks for it. Of
its layer the experts are used (SparseGLU, GroupedGLU, their topology and padding); router and permutation are the model's.
Shape suffixes: R rows sorted by expert, P padded rows, E experts, H hidden, I intermediate, F = E x I.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from h3scale.errors import ConfigError
from h3scale.model.expert_compute import grouped_gemm, megablocks_ops
from h3scale.model.expert_compute.registry import Backend

PACKAGES = ("megablocks", "stk", "triton")
# What MegaBlocks compiles, and what stands in where that is not installed.
COMPILED = {"megablocks_ops": megablocks_ops, "grouped_gemm": grouped_gemm}
BLOCK = 128  # of stk's kernels


def load(mode: str) -> Backend:
    """`sparse` or `grouped`. ConfigError (78) without the packages, and without a GPU or Triton's interpreter."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"experts: megablocks: {', '.join(missing)} not installed (works: make megablocks; auto)")
    if not torch.cuda.is_available() and not _interpreted():
        raise ConfigError("experts: megablocks needs a GPU (works: auto; TRITON_INTERPRET=1 for tests, slowly)")
    import_megablocks()
    if _interpreted():
        _take_first_configs()
    return _sparse if mode == "sparse" else _grouped


def import_megablocks() -> ModuleType:
    """The package, with plain torch in the place of extensions that are not installed."""
    for name, stand_in in COMPILED.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = stand_in
    return importlib.import_module("megablocks")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _take_first_configs() -> None:
    """To choose between configurations Triton times them on a GPU, under its interpreter too."""
    from megablocks.backend import kernels

    for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
        kernel.configs = kernel.configs[:1]


def check_sparse(hidden: int, inner: int, dtype: torch.dtype, on_gpu: bool) -> None:
    """ConfigError (78) for what the block-sparse kernels do not take, or would compute wrong."""
    if hidden % BLOCK or inner % BLOCK:
        raise ConfigError(
            f"experts: megablocks works in blocks of {BLOCK}, and hidden and intermediate size are {hidden} and {inner} "
            "(works: megablocks_grouped, auto)"
        )
    if _interpreted() and dtype == torch.bfloat16:  # it multiplies the bits of bf16 as integers
        raise ConfigError("experts: megablocks in bf16 needs a GPU: Triton's interpreter has no products of bf16 (works: fp32)")
    if on_gpu and not _interpreted() and dtype == torch.float32:
        raise ConfigError("experts: megablocks multiplies fp32 in tf32 on a GPU, too roughly (works: megablocks_grouped, auto)")


def _sparse(rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    from megablocks import ops
    from megablocks.layers.glu import SparseGLU

    experts, hidden, inner = w2_EHI.shape
    check_sparse(hidden, inner, rows_RH.dtype, rows_RH.is_cuda)
    counts_E = counts_E.int()
    total = int(counts_E.sum())
    if not total:
        return torch.zeros_like(rows_RH)
    bins_E = counts_E.cumsum(0, dtype=torch.int32)
    padded_E = ops.round_up(counts_E, BLOCK).cumsum(0, dtype=torch.int32)
    row_R = torch.arange(total, dtype=torch.int32, device=rows_RH.device)
    expert_R = torch.searchsorted(bins_E, row_R, right=True, out_int32=True)
    rows_PH = ops.padded_gather(rows_RH[:total], row_R, expert_R, bins_E, padded_E, 1)
    with torch.no_grad():
        topology = _layer(experts, inner, rows_RH.dtype).topology(rows_PH, padded_E)
    out_PH = _glu(SparseGLU, _flat(w1, w2_EHI, w3), rows_PH, topology)
    out_RH = ops.padded_scatter(out_PH, row_R, expert_R, None, bins_E, padded_E, 1)
    return F.pad(out_RH, (0, 0, 0, len(rows_RH) - total))


def _grouped(rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    from megablocks.layers.glu import GroupedGLU

    return _glu(GroupedGLU, _flat(w1, w2_EHI, w3), rows_RH, counts_E, num_experts=len(w2_EHI))


def _flat(w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> list[Callable[[], Tensor]]:
    """How w1, v1 and w2 are made, (F, H) each as MegaBlocks has them: gate, up, and down the other way round."""
    inner = w2_EHI.shape[2]
    if w3 is None:
        return [lambda: w1[:, :inner].flatten(0, 1), lambda: w1[:, inner:].flatten(0, 1), lambda: w2_EHI.mT.flatten(0, 1)]
    return [lambda: w1.flatten(0, 1), lambda: w3.flatten(0, 1), lambda: w2_EHI.mT.flatten(0, 1)]


def _glu(kind: type[Any], made: Sequence[Callable[[], Tensor]], *inputs: Any, num_experts: int = 1) -> Tensor:
    """MegaBlocks' own forward, on weights that it does not own."""
    matrices_FH = [make() for make in made]
    stand_in = SimpleNamespace(**dict(zip(("w1", "v1", "w2"), matrices_FH, strict=True)), scale_grad=lambda weight: weight)
    stand_in.args = SimpleNamespace(
        memory_optimized_mlp=False,
        activation_fn=F.silu,
        hidden_size=matrices_FH[0].shape[1],
        moe_num_experts=num_experts,
        moe_expert_model_parallelism=False,
    )
    # Within an activation checkpoint, whose hooks keep nothing at all, ours would keep the activations.
    checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    with nullcontext() if checkpointed else _made_again(matrices_FH, made):
        return kind.forward(stand_in, *inputs)


def _made_again(matrices: Sequence[Tensor], made: Sequence[Callable[[], Tensor]]) -> saved_tensors_hooks:
    """Keeps autograd from holding the matrices, or views of them: they are made again for the backward.

    Under ZeRO-3 they would hold the gathered weights of all layers (see model.expert_compute.swiglu).
    """
    known = {
        matrix.untyped_storage().data_ptr(): (matrix.storage_offset(), make) for matrix, make in zip(matrices, made, strict=True)
    }

    def pack(value: Tensor) -> Any:
        found = known.get(value.untyped_storage().data_ptr())
        if found is None:
            return value
        offset, make = found
        return make, value.size(), value.stride(), value.storage_offset() - offset

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, size, stride, offset = packed
        with torch.no_grad():
            matrix = make()
        return matrix.as_strided(size, stride, matrix.storage_offset() + offset)

    return saved_tensors_hooks(pack, unpack)


def _layer(experts: int, inner: int, dtype: torch.dtype) -> Any:
    """MegaBlocks' layer as far as its topology needs it."""
    from megablocks.layers.dmoe import ParallelDroplessMLP

    layer = ParallelDroplessMLP.__new__(ParallelDroplessMLP)
    nn.Module.__init__(layer)
    layer.blocking, layer.ffn_hidden_size, layer.num_experts = BLOCK, inner, experts
    layer.transpose_sort_end_bit = max(1, (experts * inner // BLOCK - 1).bit_length())
    layer.args = SimpleNamespace(
        moe_num_experts=experts,
        moe_expert_model_parallelism=False,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
    )
    return layer
