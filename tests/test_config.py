from __future__ import annotations

from typing import Any

import pytest

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
        ({"kv": "other"}, "there are 'virtual', 'paged'"),
        ({"reservation": "half"}, "there are 'max', 'pow2', 'oracle'"),
        ({"kv": "reserved", "enable_prefix_caching": True}, "memory that can be shared"),
        ({"block_size": 0}, "block_size must be 1 to 256 tokens, not 0"),
        ({"block_size": 512}, "block_size must be 1 to 256 tokens, not 512"),
        ({"quantization": "int3"}, "quantization='int3' is not known; there are 'int8', 'int4'"),
        ({"quantization": "int8", "device": "cuda"}, "and device='cuda' is none; leave one of them out"),
    ],
)
def test_managers_and_their_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="m", **options)


def test_prefix_caching_with_blocks() -> None:
    assert EngineConfig(model="m", kv="paged", block_size=32, enable_prefix_caching=True).block_size == 32
