"""In float32, greedy tokens equal `model.generate`'s, whatever shares the batch and however prompts are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.attention.dense import DenseManager
from tests.model.architectures import ARCHITECTURES, MAX_LEN, VOCAB_SIZE, WINDOW
from tests.model.greedy import generate, greedy
from vattention.attention.registry import KERNELS, runnable
from vattention.kv.manager import LayerView
from vattention.model.probe import ModelAttention, probe
from vattention.model.runner import ModelRunner

NUM_TOKENS = 16
NUM_SLOTS = 12
LENGTHS = (2 * WINDOW, WINDOW + 1, 5 * WINDOW + 3, 1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model(architecture: str) -> PreTrainedModel:
    return ARCHITECTURES[architecture]()


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS * 8
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@cache
def expected(architecture: str) -> list[list[int]]:
    return generate(model(architecture), prompts(), NUM_TOKENS)


def computed(
    architecture: str, attention: ModelAttention, num_prompts: int, kernel: str = "auto", **options: int
) -> list[list[int]]:
    kv = DenseManager(attention.cache_specs, num_slots=NUM_SLOTS, max_len=MAX_LEN)
    runner = ModelRunner(model(architecture), attention, kv, kernel)
    try:
        return greedy(runner, kv, prompts()[:num_prompts], NUM_TOKENS, **options)
    finally:
        runner.close()


@pytest.mark.parametrize("num_prompts", [1, 5, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_those_of_generate(architecture: str, num_prompts: int) -> None:
    tokens = computed(architecture, probe(model(architecture)), num_prompts)
    assert tokens == expected(architecture)[:num_prompts]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_vary(architecture: str) -> None:
    tokens = expected(architecture)
    assert len({token for sequence in tokens for token in sequence}) > 20
    assert len(set(map(tuple, tokens))) > 16


@pytest.mark.parametrize(("max_chunk", "max_batch"), [(1, 1), (3, 64), (64, 64), (64, 1000)])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt2", "gpt-oss", "gemma3n"])
def test_however_prompts_are_cut(architecture: str, max_chunk: int, max_batch: int) -> None:
    attention = probe(model(architecture))
    tokens = computed(architecture, attention, 6, max_chunk=max_chunk, max_batch=max_batch)
    assert tokens == expected(architecture)[:6]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("kernel", [name for name in runnable("cpu") if KERNELS[name].reads is LayerView])
def test_with_every_kernel(architecture: str, kernel: str) -> None:
    assert computed(architecture, probe(model(architecture)), 5, kernel) == expected(architecture)[:5]


@pytest.mark.parametrize(
    ("architecture", "dropped"),
    [
        ("mistral", {"window": None}),
        ("qwen2-moe", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt-oss", {"has_sinks": False}),
        ("gpt-oss", {"window": None}),
        ("gemma2", {"scale": 16**-0.5}),
        ("gpt2", {"scale": 8**-0.5}),
        ("opt", {"scale": 8**-0.5}),
    ],
)
def test_a_dropped_feature_shows(architecture: str, dropped: dict[str, Any]) -> None:
    attention = probe(model(architecture))
    less = replace(
        attention,
        layers=tuple(replace(layer, spec=replace(layer.spec, **dropped)) for layer in attention.layers),
    )
    assert less != attention
    assert computed(architecture, less, 5) != expected(architecture)[:5]
