"""Compiles the Triton kernels for GPUs that need not be there, and prints what shared memory they take, and how
many of their copies are of 16 bytes.

python -m tests.attention.compile_triton
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vattention.attention import triton_kernels
from vattention.attention.triton_decode import strip

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = ((90, torch.bfloat16, 128, 0, 4), (90, torch.float32, 256, 16, 1), (80, torch.float16, 64, 16, 2))
"""Compute capability, type, numbers of a head, block size, parts."""


def signature(kernel: Any, constants: Mapping[str, Any], dtype: torch.dtype) -> dict[str, str]:
    kinds = dict.fromkeys(("query", "output"), f"*{TYPES[dtype]}") | dict.fromkeys(("keys", "values"), "i64")
    kinds |= dict.fromkeys(("tables", "slots", "first_keys", "end_keys"), "*i32")
    kinds |= dict.fromkeys(("parts", "maxima", "sums", "sinks"), "*fp32")
    kinds |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    return {name: kinds.get(name, "i32") for name in kernel.arg_names}


def compiled(kernel: Any, constants: Mapping[str, Any], dtype: torch.dtype, capability: int) -> Any:
    mine = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = signature(kernel, mine, dtype)
    # Strides and tensors that are no columns of the batch's numbers are multiples of 16.
    unknown = ("scale", "softcap", "slots", "first_keys", "end_keys", "keys", "values", *mine)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds) if name not in unknown}
    return compile_kernel(ASTSource(kernel, kinds, mine, attributes), target=GPUTarget("cuda", capability, 32))


def main() -> None:
    for capability, dtype, dim, block_size, num_splits in CASES:
        constants = {
            "group": 4,
            "key_dim": dim,
            "value_dim": dim,
            "key_width": dim,
            "value_width": dim,
            "num_rows": 16,
            "strip": strip(dim, dtype),
            "num_splits": num_splits,
            "block_size": block_size,
            "has_softcap": True,
            "has_sinks": True,
            "is_aligned": True,
        }
        for kernel in (triton_kernels.partial_attention, triton_kernels.join_parts):
            found = compiled(kernel, constants, dtype, capability)
            wide = found.asm["ptx"].count("cp.async.cg")
            print(kernel.__name__, capability, TYPES[dtype], dim, found.metadata.shared, wide)


if __name__ == "__main__":
    main()
