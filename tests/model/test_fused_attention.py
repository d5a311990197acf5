"""Attention modules with a fused way in: what reaches the attention function, usual and unusual calls, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama import modeling_llama

from tests.model.architectures import ARCHITECTURES
from vattention.model.difference import TOLERANCE, row_difference
from vattention.model.fused_attention import FusedAttention, Notes, PartialLinear
from vattention.model.hook import AttentionHook
from vattention.model.optimize import optimize
from vattention.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "gemma3": lambda: Gemma3TextConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def attention_of(model: nn.Module) -> Any:
    return model.get_submodule("model.layers.0.self_attn")


def call(module: Any, num_tokens: int, batch: int = 1, scale: float = 1.0, **keywords: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = module.o_proj.weight.dtype
    hidden = torch.randn(batch, num_tokens, 48, generator=generator) * scale
    embeddings = torch.randn(2, 1, num_tokens, 20, generator=generator).to(dtype)
    output: Tensor = module(
        hidden_states=hidden.to(dtype), position_embeddings=tuple(embeddings), attention_mask=None, **keywords
    )[0]
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_reaches_attention(name: str, dtype: torch.dtype) -> None:
    before, after = build(name, dtype), build(name, dtype)
    assert optimize(after).replaced["attention"] == 1
    assert isinstance(vars(attention_of(after))["forward"], FusedAttention)
    results = []
    for model in (before, after):
        notes = Notes()
        hook = AttentionHook(model, notes)
        outputs = [
            call(attention_of(model), tokens, scale=scale, something=5)
            for tokens, scale in ((1, 1.0), (7, 1e-3), (70, 10.0))
        ]
        hook.close()
        results.append((notes.calls, outputs))
    for (inputs, keywords), (expected_inputs, expected_keywords) in zip(results[1][0], results[0][0], strict=True):
        assert keywords == expected_keywords
        assert keywords["something"] == 5
        for own, expected in zip(inputs, expected_inputs, strict=True):
            assert own.shape == expected.shape
            assert row_difference(own.reshape(-1, 20), expected.reshape(-1, 20)) <= TOLERANCE[dtype]
    for own, expected in zip(results[1][1], results[0][1], strict=True):
        assert row_difference(own[0], expected[0]) <= 2 * TOLERANCE[dtype]


def test_a_batch_goes_the_old_way() -> None:
    before, after = attention_of(build("qwen3")), build("qwen3")
    optimize(after)
    torch.testing.assert_close(
        call(attention_of(after), 6, batch=3), call(before, 6, batch=3), rtol=1e-4, atol=1e-5
    )


def test_parts_keep_their_weights() -> None:
    before, after = attention_of(build("llama")), build("llama")
    optimize(after)
    for name in ("q_proj", "k_proj", "v_proj"):
        part = getattr(attention_of(after), name)
        assert isinstance(part, PartialLinear)
        assert torch.equal(part.weight, getattr(before, name).weight)


def _rotates_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos[:, None] + other * sin[:, None]

    return turn(q), turn(k)


def _adds_to_queries(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = modeling_llama_rotation(q, k, cos, sin)
    return q + 0.01, k


modeling_llama_rotation = modeling_llama.apply_rotary_pos_emb


@pytest.mark.parametrize("rotation", [_rotates_pairs, _adds_to_queries])
def test_other_rotations_stay(
    rotation: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation)
    model = build("llama")
    before = call(attention_of(model), 5)
    assert "attention" not in optimize(model).replaced
    torch.testing.assert_close(call(attention_of(model), 5), before, rtol=1e-4, atol=1e-5)


def test_a_module_that_tells_attention_something_of_each_call_stays() -> None:
    model = build("llama")

    class Telling(type(attention_of(model))):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **keywords: Any) -> Any:
            return super().forward(
                hidden_states, position_embeddings, largest=float(hidden_states.max()), **keywords
            )

    attention_of(model).__class__ = Telling
    assert "attention" not in optimize(model).replaced


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_computes_the_same(name: str) -> None:
    model = ARCHITECTURES[name]()
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        optimize(model)
        after = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
