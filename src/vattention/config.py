"""The engine's options: written once here, read by `LLM`, the command line and the server. A leaf."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vattention.errors import ConfigError
from vattention.fields import FieldTypeError, fit

MAX_BLOCK_SIZE = 256

_LEAST_NBYTES = 4096
"""Less than this of memory is a number that lacks its unit: vLLM counts swap_space in GiB."""

_DTYPES = {"half": "float16", "float": "float32"}
"""Other names of types, as torch and vLLM have them."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_nbytes(text: str | int) -> int:
    """Bytes from 4096, "512MiB", "4GiB" or "4GB".

    Raises:
        ConfigError: the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(text).upper())
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if nbytes <= 0:
        raise ConfigError(f"{text!r} is not a size; write bytes, or a number with KiB, MiB or GiB")
    return nbytes


@dataclass(frozen=True, slots=True)
class SwapTarget:
    """Where preempted sequences are kept: in memory, or in a folder's files.

    Attributes:
        folder: None for memory.
        nbytes: the most to keep; None, with a folder, for what its file system has free.
    """

    folder: str | None
    nbytes: int | None


def parse_swap_space(text: str | int) -> SwapTarget:
    """What `swap_space` says: "4GiB" of memory, files in "/var/tmp", or at most "/var/tmp:20GiB" of them.

    Raises:
        ConfigError: it is neither a size nor a path with a slash in it.
    """
    folder, colon, size = str(text).rpartition(":")
    if "/" not in str(text):
        return SwapTarget(None, parse_nbytes(text))
    if colon and "/" not in size:
        return SwapTarget(folder, parse_nbytes(size))
    return SwapTarget(str(text), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of the engine.

    Attributes:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        tokenizer: a Hugging Face id or folder; the model's own by default.
        dtype: of weights and KV cache; "auto" takes the checkpoint's.
        quantization: keep the weights of linear layers in "int8" or "int4" and compute with them as they are;
            activations and KV cache stay in dtype. Off by default.
        device: where the model and its KV cache are: "cpu", "cuda", or "cuda:1" for the second GPU.
        max_model_len: longest prompt plus output in tokens; by default the model's own limit.
        max_num_seqs: most sequences that run at the same time, which is the number of slots.
        max_num_batched_tokens: most tokens in one forward pass; longer prompts are computed in chunks.
        max_queue: most requests waiting beside those running; the server answers 429 beyond it.
        enable_prefix_caching: keep the memory of prompts and answers, and share it with requests that begin alike;
            by default wherever the manager can.
        kv: the KV cache's memory manager: "virtual" maps pages behind contiguous rows as tokens arrive, "paged" is
            PagedAttention with its blocks and block tables, "reserved" takes a sequence's whole memory at once.
        kv_memory: most physical memory for the KV cache, such as "4GiB"; by default what this machine has to
            spare, read again every second.
        kv_layout: "per-layer" rows for each layer's K and V, or "sliced" with a token's whole K and V together.
        page_size: bytes of a page; by default the system's smallest.
        block_size: tokens of a block, with kv="paged".
        reservation: tokens that kv="reserved" takes for a sequence: the longest there can be ("max"), the prompt's
            and a power of two for the output ("pow2"), or as many as it may become ("oracle").
        swap_space: keep preempted sequences here where that is quicker than computing them again: a size of memory
            such as "4GiB", a folder for files such as "/var/tmp", or both, "/var/tmp:20GiB"; off by default. Beam
            searches are always computed again.
        attention: the attention kernel by name; "auto" takes the fastest that computes what the model needs.
        enforce_eager: launch the kernels of decode steps one by one on a GPU, instead of replaying CUDA graphs,
            which take some memory and a few seconds at the start.
        seed: seed of requests that bring none.
        trust_remote_code: run Python code that comes with the model.
        skip_tokenizer_init: serve token ids only, without a tokenizer.
    """

    model: str
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["int8", "int4"] | None = None
    device: str = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_queue: int = 1024
    enable_prefix_caching: bool | None = None
    kv: Literal["virtual", "paged", "reserved"] = "virtual"
    kv_memory: str | int | None = None
    kv_layout: Literal["per-layer", "sliced"] = "per-layer"
    page_size: str | int | None = None
    block_size: int = 16
    reservation: Literal["max", "pow2", "oracle"] = "max"
    swap_space: str | int | None = None
    attention: str = "auto"
    enforce_eager: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False

    @property
    def caches_prefixes(self) -> bool:
        """`enable_prefix_caching`, or what its default means."""
        return self.kv != "reserved" if self.enable_prefix_caching is None else self.enable_prefix_caching

    def __post_init__(self) -> None:
        # torch writes its types as torch.bfloat16.
        dtype = str(self.dtype).removeprefix("torch.")
        object.__setattr__(self, "dtype", _DTYPES.get(dtype, dtype))
        try:
            fit(self)
        except FieldTypeError as error:
            raise ConfigError(str(error)) from None
        if not self.model:
            raise ConfigError("model must name a model, and is empty")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"max_model_len must be at least 1, not {self.max_model_len}")
        if self.quantization is not None and self.device != "cpu":
            raise ConfigError(
                f"quantization={self.quantization!r} is for models in processor memory, and device={self.device!r} "
                "is none; leave one of them out"
            )
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size must be 1 to {MAX_BLOCK_SIZE} tokens, not {self.block_size}")
        if self.enable_prefix_caching and self.kv == "reserved":
            raise ConfigError(
                "enable_prefix_caching=True needs memory that can be shared, which kv='reserved' has not"
            )
        if self.page_size is not None:
            parse_nbytes(self.page_size)
        for name, nbytes in (
            ("kv_memory", None if self.kv_memory is None else parse_nbytes(self.kv_memory)),
            ("swap_space", None if self.swap_space is None else parse_swap_space(self.swap_space).nbytes),
        ):
            if nbytes is not None and nbytes < _LEAST_NBYTES:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is {nbytes} bytes, which is no page; name a unit, such as 4GiB"
                )
