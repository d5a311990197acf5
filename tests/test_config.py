from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vattention.config import EngineConfig, SwapTarget, parse_swap_space
from vattention.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("4GiB", SwapTarget(None, 4 << 30)),
        (4096, SwapTarget(None, 4096)),
        ("/var/tmp", SwapTarget("/var/tmp", None)),
        ("/var/tmp:20GiB", SwapTarget("/var/tmp", 20 << 30)),
        ("./swap:1MB", SwapTarget("./swap", 10**6)),
        ("/odd:folder/inside", SwapTarget("/odd:folder/inside", None)),
    ],
)
def test_swap_space_is_a_size_a_folder_or_both(text: str | int, target: SwapTarget) -> None:
    assert parse_swap_space(text) == target
    assert EngineConfig(model="m", swap_space=text).swap_space == text


@pytest.mark.parametrize("text", ["tmp", "0", "-1GiB", "/var/tmp:", "/var/tmp:much", "swap:1GiB"])
def test_what_swap_space_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        EngineConfig(model="m", swap_space=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "other"}, "kv must be 'virtual', 'paged' or 'reserved', not 'other'"),
        ({"reservation": "half"}, "must be 'max', 'pow2' or 'oracle', not 'half'"),
        ({"kv_layout": "sideways"}, "kv_layout must be 'per-layer' or 'sliced', not 'sideways'"),
        ({"dtype": "float64"}, "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not 'float64'"),
        ({"max_model_len": "64"}, "max_model_len must be an integer or None, not '64'"),
        ({"max_num_seqs": 4.0}, "max_num_seqs must be an integer, not 4.0"),
        ({"enable_prefix_caching": "false"}, "enable_prefix_caching must be True, False or None, not 'false'"),
        ({"kv_memory": 4.5}, "kv_memory must be a string, an integer or None, not 4.5"),
        ({"kv_memory": 4}, "kv_memory=4 is 4 bytes, which is no page; name a unit, such as 4GiB"),
        ({"swap_space": 4}, "swap_space=4 is 4 bytes"),
        ({"swap_space": "/var/tmp:4"}, "swap_space='/var/tmp:4' is 4 bytes"),
        ({"model": None}, "model must be a string, not None"),
        ({"model": ""}, "model must name a model"),
        ({"kv": "reserved", "enable_prefix_caching": True}, "memory that can be shared"),
        ({"block_size": 0}, "block_size must be 1 to 256 tokens, not 0"),
        ({"block_size": 512}, "block_size must be 1 to 256 tokens, not 512"),
        ({"quantization": "int3"}, "quantization must be 'int8', 'int4' or None, not 'int3'"),
        ({"quantization": "int8", "device": "cuda"}, "and device='cuda' is none; leave one of them out"),
    ],
)
def test_managers_and_their_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"model": "m", **options})


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), ("half", "float16"), ("float", "float32")]
)
def test_types_by_other_names(dtype: Any, name: str) -> None:
    assert EngineConfig(model="m", dtype=dtype).dtype == name


def test_a_model_may_be_a_path() -> None:
    folder: Any = Path("/models/one")
    assert (
        EngineConfig(model=folder, tokenizer=folder).tokenizer == EngineConfig(model=folder).model == "/models/one"
    )


def test_prefix_caching_with_blocks() -> None:
    assert EngineConfig(model="m", kv="paged", block_size=32, enable_prefix_caching=True).block_size == 32
