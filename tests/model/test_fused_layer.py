"""Decoder layers in one call: the same hidden states and caches, and refusals of layers that add up otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from tests.model.architectures import ARCHITECTURES
from tests.model.greedy import generate, greedy
from vattention.attention.compiled import NativeKernel
from vattention.attention.kernel import RaggedBatch
from vattention.config import EngineConfig
from vattention.core import AttentionSpec, Chunk
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager, LayerView
from vattention.model import optimize as optimizing
from vattention.model import runner as running
from vattention.model.batch_attention import BatchAttention, Place
from vattention.model.decoder_stack import DecoderStack
from vattention.model.fused_layer import FusedLayer, fuse_layers
from vattention.model.native_linear import NativeLinear
from vattention.model.optimize import optimize
from vattention.model.probe import probe
from vattention.model.runner import ModelRunner
from vattention.native import AttentionCache, kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")

PROMPTS = [[5, 9, 33, 2, 71, 8, 9], [7, 7, 40], [100, 3, 64, 21, 90, 11, 12, 13, 14, 15, 16, 17]]
FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.fixture(autouse=True)
def compiled_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "fastest_method", lambda *_: NativeLinear)


def fused(model: PreTrainedModel) -> int:
    optimize(model)
    return fuse_layers(model, probe(model))


def manager(kv: str, model: PreTrainedModel, specs: Any) -> KVManager:
    config = EngineConfig(model="none", kv=kv, max_num_seqs=4, kv_memory="16MiB", block_size=4)  # type: ignore[arg-type]
    return create_manager(config, specs, dtype=model.dtype, device="cpu", max_len=64)


@pytest.mark.parametrize("kv", ["virtual", "paged", "reserved"])
@pytest.mark.parametrize("name", FUSED)
def test_tokens_equal_those_of_generate(name: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES[name]()
    expected = generate(model, PROMPTS, 12)
    optimize(model)
    attention = probe(model)
    assert fuse_layers(model, attention) == len(attention.layers)
    claims: list[bool] = []

    class Watched(BatchAttention):
        def claim(
            self, module: nn.Module, dtype: torch.dtype, prefills: bool
        ) -> tuple[AttentionCache, RaggedBatch] | None:
            claimed = super().claim(module, dtype, prefills)
            claims.append(claimed is not None)
            return claimed

    monkeypatch.setattr(running, "BatchAttention", Watched)
    monkeypatch.setattr(DecoderStack, "of", lambda *_: None)
    cache = manager(kv, model, attention.cache_specs)
    runner = ModelRunner(model, attention, cache)
    try:
        assert greedy(runner, cache, PROMPTS, 12) == expected
    finally:
        runner.close()
        cache.close()
    assert sum(claims) >= 8 * len(attention.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_gives_the_same_with_and_without(dtype: torch.dtype) -> None:
    model = ARCHITECTURES["gemma3"]().to(dtype)
    optimize(model)
    attention = probe(model)
    results = []
    for expected in (0, len(attention.layers)):
        if expected:
            assert fuse_layers(model, attention) == expected
        cache = manager("virtual", model, attention.cache_specs)
        runner = ModelRunner(model, attention, cache)
        slots = [cache.take(prompt).slot for prompt in PROMPTS]
        for slot, prompt in zip(slots, PROMPTS, strict=True):
            cache.ensure(slot, 0, len(prompt) + 1)
            runner.forward([Chunk(slot, 0, prompt, 1)])
        last = [Chunk(slot, len(prompt), [17], 1) for slot, prompt in zip(slots, PROMPTS, strict=True)]
        results.append(runner.forward(last[::-1]))
        runner.close()
        cache.close()
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_a_layer_that_adds_up_otherwise_stays(dtype: torch.dtype, deviation: float) -> None:
    """Granite's modules are Llama's, but it scales what it adds to the residual stream."""
    config = GraniteConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        residual_multiplier=0.5,
        initializer_range=deviation,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert fused(model) == 0
    assert all(not isinstance(layer.forward, FusedLayer) for layer in model.model.layers)
    config.residual_multiplier = 1.0
    assert fused(AutoModelForCausalLM.from_config(config).eval().to(dtype)) == 4


def test_only_a_decode_over_a_cache_of_the_same_type_can_be_claimed() -> None:
    module, spec = nn.Identity(), AttentionSpec(2, 1, 8, 8, 1.0)
    view = LayerView(torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8))
    attention = BatchAttention({module: Place(0, spec, view, True, NativeKernel())})
    assert attention.claim(module, torch.float32, True) is None
    for chunks, dtype, expected in (
        ([Chunk(0, 0, [5], 1), Chunk(1, 2, [6], 1)], torch.float32, True),
        ([Chunk(0, 0, [5], 1), Chunk(1, 2, [6], 1)], torch.bfloat16, False),
        ([Chunk(0, 0, [5, 6], 1)], torch.float32, False),
        ([Chunk(0, 0, [], 0), Chunk(1, 0, [5, 6], 1)], torch.float32, False),
    ):
        attention.begin(RaggedBatch.of(chunks))
        assert (attention.claim(module, dtype, False) is not None) == expected
        assert attention.num_attended == expected
        attention.begin(RaggedBatch.of(chunks))
        assert (attention.claim(module, dtype, True) is not None) == (dtype == torch.float32)


def test_models_with_other_layers_stay() -> None:
    for name in ("gpt2", "opt", "mixtral", "gpt-oss", "phi3"):
        assert fused(ARCHITECTURES[name]()) == 0, name
