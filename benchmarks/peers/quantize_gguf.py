"""Quantise a GGUF file with llama.cpp's own code, in llama.cpp's environment.

.venvs/llamacpp/bin/python -m benchmarks.peers.quantize_gguf IN OUT q8_0
"""

from __future__ import annotations

import argparse
import ctypes

import llama_cpp

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantise a GGUF file.")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("type", choices=sorted(FILE_TYPES))
    arguments = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[arguments.type]
    params.nthread = 1
    code = llama_cpp.llama_model_quantize(
        arguments.source.encode(), arguments.target.encode(), ctypes.byref(params)
    )
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main()
