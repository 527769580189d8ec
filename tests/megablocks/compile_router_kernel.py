"""Compiles the router's kernel to machine code of GPUs, with no GPU: python -m tests.megablocks.compile_router_kernel."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from h3scale.train.router_kernel import _kernel

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
POINTERS = {"labels": "*i64", "votes": "*u8", "member": "*u8", "gradient": "*fp32", "found": "*fp32"}
NUMBERS = {"num_tokens": "i32", "num_layers": "i32", "num_found": "i32"}
WEIGHTS = {"router_weight": "fp32", "z_weight": "fp32", "balance_weight": "fp32"}


def source(logits: str, has_shares: bool, ones: tuple[str, ...] = ()) -> ASTSource:
    """`ones`: numbers that are 1, which Triton makes constants of."""
    constants = {"NUM_EXPERTS": 9, "NUM_ALIGNMENTS": 3, "TOP_K": 2, "BLOCK_T": 32, "BLOCK_E": 16, "BLOCK_A": 4}
    constants |= {"HAS_GRADIENT": True, "HAS_SHARES": has_shares, **dict.fromkeys(ones, 1)}
    types = {"logits": logits, "shares": "*fp64" if has_shares else "*fp32", **POINTERS, **NUMBERS, **WEIGHTS}
    names = _kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    return ASTSource(_kernel, signature, constexprs=constants)


for capability in CAPABILITIES:
    for kernel in (source("*bf16", False), source("*fp32", True), source("*bf16", True, ("num_tokens", "num_layers"))):
        compiled = triton.compile(kernel, target=GPUTarget("cuda", capability, 32))
        print(capability, len(compiled.asm["cubin"]))
