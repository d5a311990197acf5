"""What is compared: an engine with a choice of precisions and options is a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peers.environments import LLAMACPP, OPENVINO, TRANSFORMERS, VATTENTION, VLLM, Environment

OURS = "vattention"
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "q8_0": 8, "int4": 4, "q4_k_m": 4}
"""By the name of weights."""


SHARED_PREFIX = frozenset({"w4"})


@dataclass(frozen=True, slots=True)
class Row:
    """One row of every table.

    Attributes:
        peer: what `--peers` chooses by.
        module: the engine's script.
        weights, kv: precisions, as the table names them.
        file: the model's file that it loads, by its name in `benchmarks.peers.models`.
        options: of the script.
        workloads: those it takes part in; all when empty.
        against: the row of ours it is compared with.
    """

    name: str
    peer: str
    environment: Environment
    module: str
    weights: str = "bf16"
    kv: str = "bf16"
    file: str = "checkpoint"
    options: tuple[str, ...] = ()
    workloads: frozenset[str] = frozenset()
    against: str = OURS

    @property
    def bits(self) -> int:
        """Of a weight, which make rows comparable; scales beside them aside."""
        return BITS[self.weights]

    @property
    def ours(self) -> bool:
        return self.peer == OURS

    @property
    def prefix_cached(self) -> bool:
        return self.workloads == SHARED_PREFIX

    def takes(self, workload: str) -> bool:
        return not self.workloads or workload in self.workloads


OURS_CACHED = "vattention, prefix cache"
OURS_INT8, OURS_INT4 = "vattention, int8", "vattention, int4"
ENGINES = "benchmarks.peers.engines"


def _quantized(name: str, weights: str) -> Row:
    return Row(
        name,
        "vattention",
        VATTENTION,
        f"{ENGINES}.ours",
        weights=weights,
        options=("--quantization", weights),
    )


def _llamacpp(weights: str, file: str, against: str = OURS) -> Row:
    return Row(
        f"llama.cpp, {weights}",
        "llamacpp",
        LLAMACPP,
        f"{ENGINES}.llamacpp",
        weights=weights,
        kv="f16",
        file=file,
        against=against,
    )


def _openvino(name: str, weights: str, kv: str, against: str = OURS) -> Row:
    return Row(
        name,
        "openvino",
        OPENVINO,
        f"{ENGINES}.openvino_genai",
        weights=weights,
        kv=kv,
        file=f"openvino-{weights}",
        options=("--kv-precision", kv),
        against=against,
    )


ROWS = (
    Row(OURS, "vattention", VATTENTION, f"{ENGINES}.ours"),
    Row(
        "vattention, sliced",
        "vattention",
        VATTENTION,
        f"{ENGINES}.ours",
        options=("--kv-layout", "sliced"),
    ),
    Row(
        OURS_CACHED,
        "vattention",
        VATTENTION,
        f"{ENGINES}.ours",
        options=("--prefix-caching",),
        workloads=SHARED_PREFIX,
    ),
    _quantized(OURS_INT8, "int8"),
    _quantized(OURS_INT4, "int4"),
    Row("transformers, generate", "transformers", TRANSFORMERS, f"{ENGINES}.transformers_generate"),
    Row("transformers, generate_batch", "transformers", TRANSFORMERS, f"{ENGINES}.transformers_batch"),
    Row("vLLM", "vllm", VLLM, f"{ENGINES}.vllm_cpu"),
    Row(
        "vLLM, prefix cache",
        "vllm",
        VLLM,
        f"{ENGINES}.vllm_cpu",
        options=("--prefix-caching",),
        workloads=SHARED_PREFIX,
        against=OURS_CACHED,
    ),
    _llamacpp("bf16", "bf16.gguf"),
    _llamacpp("q8_0", "q8_0.gguf", against=OURS_INT8),
    _llamacpp("q4_k_m", "q4_k_m.gguf", against=OURS_INT4),
    Row(
        "llama.cpp, prefix copied",
        "llamacpp",
        LLAMACPP,
        f"{ENGINES}.llamacpp",
        kv="f16",
        file="bf16.gguf",
        options=("--share-prefix",),
        workloads=SHARED_PREFIX,
        against=OURS_CACHED,
    ),
    _openvino("OpenVINO", "fp16", "bf16"),
    _openvino("OpenVINO, int8", "int8", "u8", against=OURS_INT8),
    Row(
        "OpenVINO, prefix cache",
        "openvino",
        OPENVINO,
        f"{ENGINES}.openvino_genai",
        weights="fp16",
        file="openvino-fp16",
        options=("--prefix-caching",),
        workloads=SHARED_PREFIX,
        against=OURS_CACHED,
    ),
)


def chosen(peers: Sequence[str], names: Sequence[str] = ()) -> list[Row]:
    """The rows of these peers, ours always among them, or those of these names; all when nothing is named.

    Raises:
        ValueError: there is no such peer, or no such row.
    """
    known = {row.peer for row in ROWS}
    if unknown := set(peers) - known:
        raise ValueError(f"{', '.join(sorted(unknown))}: the peers are {', '.join(sorted(known))}")
    if unknown := set(names) - {row.name for row in ROWS}:
        raise ValueError(f"{'; '.join(sorted(unknown))}: the rows are {'; '.join(row.name for row in ROWS)}")
    of_peers = [row for row in ROWS if not peers or row.peer in {*peers, OURS}]
    return [row for row in of_peers if not names or row.name in names]
