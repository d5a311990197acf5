"""Arguments of vLLM's `LLM` that this engine has not: which ask for nothing, and what to use instead. A leaf."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vattention.errors import ConfigError

ASK_FOR_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "calculate_kv_scales": (False,),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": (True, False),
    "disable_log_stats": (True, False),
    "distributed_executor_backend": ("mp", "ray", "uni"),
    "enable_chunked_prefill": (True,),
    "enable_expert_parallel": (False,),
    "enable_lora": (False,),
    "generation_config": ("auto",),
    "kv_cache_dtype": ("auto",),
    "load_format": ("auto", "safetensors"),
    "pipeline_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "task": ("auto", "generate"),
    "tensor_parallel_size": (1,),
    "tokenizer_mode": ("auto",),
}
"""Names, and the values with which they change nothing."""

INSTEAD: Mapping[str, str] = {
    "gpu_memory_utilization": "the KV cache takes what the machine can spare; kv_memory limits it",
    "kv_cache_memory_bytes": "use kv_memory",
    "load_format": "weights are read from safetensors or GGUF files",
    "max_num_partial_prefills": "use max_num_batched_tokens",
    "tensor_parallel_size": "a model runs on one device",
    "pipeline_parallel_size": "a model runs on one device",
    "data_parallel_size": "a model runs on one device",
    "kv_cache_dtype": "keys and values have the type of the weights, which dtype sets",
    "enable_chunked_prefill": "prompts longer than max_num_batched_tokens are always computed in chunks",
    "generation_config": "pass SamplingParams instead of the model's recommended ones",
    "download_dir": "set the environment variable HF_HOME",
    "revision": "download that revision, and name its folder as the model",
    "num_gpu_blocks_override": "use kv_memory",
}


def known(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those of `options` that are among `names`, less what is None, which is the same as leaving it out.

    Raises:
        ConfigError: another of them asks for something that there is not.
    """
    kept = {name: value for name, value in options.items() if value is not None}
    for name in sorted(set(kept) - set(names)):
        value = kept.pop(name)
        if any(value == idle and type(value) is type(idle) for idle in ASK_FOR_NOTHING.get(name, ())):
            continue
        if name in INSTEAD:
            raise ConfigError(f"LLM does not take {name}={value!r}: {INSTEAD[name]}")
        raise ConfigError(f"LLM has no argument {name!r}; it takes {', '.join(sorted(names))}")
    return kept
