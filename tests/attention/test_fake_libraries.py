"""The fakes against the libraries they stand for, of which most machines have none but torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.attention import fake_libraries


def assert_takes(real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """That `real` takes whatever `fake` does."""
    given = list(inspect.signature(fake).parameters.values())
    there = inspect.signature(real).parameters
    positional = [each.name for each in given if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert list(there)[: len(positional)] == positional
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in there.values()):
        assert {each.name for each in given} <= set(there)


def test_torchs_flash_attention() -> None:
    there = [each.name for each in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    taken = list(inspect.signature(fake_libraries.FakeTorchFlash()).parameters)
    if "block_table" not in there:  # torch 2.11
        taken.remove("block_table")
    assert there[:10] == taken[:10]
    assert set(taken) <= set(there)


@pytest.mark.parametrize("name", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"])
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_flashinfer(name: str, method: str) -> None:
    real, fake = getattr(pytest.importorskip("flashinfer"), name), getattr(fake_libraries, name)
    if method == "run":
        assert list(inspect.signature(real.run).parameters)[:3] == ["self", "q", "paged_kv_cache"]
    else:
        assert_takes(getattr(real, method), getattr(fake, method))


@pytest.mark.parametrize(
    ("module", "fake"),
    [
        ("flash_attn", fake_libraries.FakeFlashAttention2),
        ("flash_attn_interface", fake_libraries.FakeFlashAttention3),
    ],
)
def test_flash_attention(module: str, fake: Any) -> None:
    real = getattr(pytest.importorskip(module), "flash_attn_with_kvcache", None)
    if real is None:
        pytest.skip(f"this {module} is version 4")
    assert_takes(real, fake.flash_attn_with_kvcache)
