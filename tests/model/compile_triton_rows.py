"""Compiles the kernels of rows for GPUs that need not be there, and prints how many of their loads are of 16 bytes.

python -m tests.model.compile_triton_rows
"""

from __future__ import annotations

from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vattention.model import triton_row_kernels as written

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = ((90, torch.bfloat16), (80, torch.float16))
"""Compute capability, type."""

CONSTANTS: dict[str, dict[str, Any]] = {
    "rms_norm": {"width": 4096, "block": 4096},
    "gate": {"block": 1024},
    "rotate": {"half": 64, "block": 64, "heads_at_a_time": 4, "norms_queries": True, "norms_keys": True},
}
WARPS = {"rms_norm": 8, "gate": 2, "rotate": 1}


def compiled(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, capability: int, num_warps: int) -> Any:
    kinds = dict.fromkeys(("x", "y", "gate_up", "cosines", "sines"), f"*{TYPES[dtype]}")
    kinds |= dict.fromkeys(("scale", "scales"), "*fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("epsilon", "query_epsilon", "key_epsilon", "linear", "cubic"), "fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    divisible = [n for n, kind in enumerate(signature.values()) if kind.startswith("*")]
    divisible += [n for n, name in enumerate(signature) if name == "width" and name not in constants]
    attributes = {(n,): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def main() -> None:
    for capability, dtype in CASES:
        for name, constants in CONSTANTS.items():
            found = compiled(getattr(written, name), constants, dtype, capability, WARPS[name])
            print(name, capability, TYPES[dtype], found.asm["ptx"].count("ld.global.v4"))


if __name__ == "__main__":
    main()
