"""`optimize` on models of several architectures: same results, from replaced modules; refusals; memory."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from vattention.model import optimize as subject
from vattention.model.fused import FusedGatedMLP, FusedRMSNorm
from vattention.model.linear import LinearMethod, PackedLinear
from vattention.model.native_linear import NativeLinear
from vattention.model.optimize import optimize
from vattention.model.torch_linear import OneDnnLinear, WideningLinear
from vattention.native import kernels

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-bias": LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True),
    "gemma3": Gemma3TextConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None),
    "opt": OPTConfig(
        vocab_size=101,
        hidden_size=48,
        ffn_dim=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=48,
    ),
}

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms start as ones, or as zeros in Gemma: results shall depend on them.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def force(monkeypatch: pytest.MonkeyPatch, method: type[LinearMethod]) -> None:
    monkeypatch.setattr(subject, "fastest_method", lambda *shape: method)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


METHODS = [
    pytest.param(method, id=method.name)
    for method in (NativeLinear, OneDnnLinear)
    if method.available(torch.float32)
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_models_compute_the_same(
    name: str, method: type[LinearMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    before = logits(model)
    force(monkeypatch, method)
    report = optimize(model)
    assert report.refused == ()
    assert sum(report.replaced.values()) > 0
    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, NativeLinear)
    model = build("gemma3")
    # Per layer o; the output layer. Four norms around the blocks, two in attention; the last one.
    assert optimize(model).replaced == {"attention": 2, "native": 2 + 1, "gated mlp": 2, "rms norm": 2 * 6 + 1}
    assert sum(isinstance(module, FusedGatedMLP) for module in model.modules()) == 2
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == 13


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.bfloat16)
    before = logits(model).float()
    force(monkeypatch, NativeLinear)
    assert optimize(model).refused == ()
    after = logits(model).float()
    exact = logits(build(name, torch.bfloat16).float())
    assert float((after - exact).square().mean()) <= 1.1 * float((before - exact).square().mean())


def test_greedy_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    prompt = torch.arange(5)[None]
    before = model.generate(prompt, max_new_tokens=40, do_sample=False)  # type: ignore[operator]
    force(monkeypatch, NativeLinear if kernels() else OneDnnLinear)
    optimize(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), before)  # type: ignore[operator]


def test_without_kernels_linear_layers_alone_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "row_kernels", lambda _: None)
    force(monkeypatch, WideningLinear)
    model = build("llama", torch.bfloat16)
    before = logits(model).float()
    assert optimize(model).replaced == {"widening": 2 * 7 + 1}
    torch.testing.assert_close(logits(model).float(), before, rtol=0, atol=0.05 * float(before.abs().max()))


def test_measuring_picks_something_for_every_layer() -> None:
    model = build("llama", torch.bfloat16)
    report = optimize(model)
    num_layers = report.kept + sum(report.replaced.values())
    assert report.refused == ()
    assert num_layers >= 2 * 4 + 1
    assert bool(logits(model).isfinite().all())


class TestMemory:
    def test_originals_are_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, OneDnnLinear)
        model = build("llama")
        originals = [weakref.ref(module) for module in model.modules() if type(module) is nn.Linear]
        report = optimize(model)
        gc.collect()
        assert len(originals) == 15
        assert not any(reference() for reference in originals)
        assert report.copied_nbytes == 0
        # A layer's three feed-forward weights, and two of them as one on the way there; or the output layer.
        assert report.peak_copied_nbytes == 4 * (5 * 72 * 48 if kernels() else 101 * 48)

    def test_a_tied_embedding_keeps_its_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, OneDnnLinear)
        model = build("gemma3")
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        weight = embedding.weight
        report = optimize(model)
        assert isinstance(model.lm_head, PackedLinear)
        assert embedding.weight is weight
        assert report.copied_nbytes == weight.nbytes
        assert torch.equal(model.lm_head.weight, weight)


class TestRefusal:
    def test_a_wrong_replacement_stays_out(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class WrongInTheLastRow(OneDnnLinear):
            def __call__(self, x: Tensor) -> Tensor:
                y = super().__call__(x)
                if len(x) == 64:
                    y[-1] *= 1.01
                return y

        force(monkeypatch, WrongInTheLastRow)
        model = nn.Sequential(nn.Linear(8, 600))
        linear = model[0]
        with caplog.at_level(logging.WARNING):
            report = optimize(model)
        assert report.refused == ("0",)
        assert report.replaced == {}
        assert model[0] is linear
        assert "0 stays as it is" in caplog.text

    def test_hooks_and_subclasses_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        force(monkeypatch, OneDnnLinear)
        model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].register_forward_hook(lambda module, args, out: out + 1)
        kept = list(model)[:2]
        report = optimize(model)
        assert list(model)[:2] == kept
        assert sum(report.replaced.values()) == 1

    @needs_kernels
    def test_another_norm_under_the_same_name(self) -> None:
        class CentredRMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(20))
                self.eps = 1e-6

            def forward(self, x: Tensor) -> Tensor:
                return F.layer_norm(x, (20,), self.weight, eps=self.eps)

        model = nn.Sequential(CentredRMSNorm())
        assert optimize(model).refused == ("0",)
        assert isinstance(model[0], CentredRMSNorm)

    @needs_kernels
    def test_modules_in_other_memory_stay(self) -> None:
        class SomeRMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(64))
                self.variance_epsilon = 1e-6

            def forward(self, hidden_states: Tensor) -> Tensor:
                raise AssertionError("no kernel for processors may be tried")

        model = nn.Sequential(SomeRMSNorm(), nn.Linear(64, 64)).to("meta").requires_grad_(False)
        optimize(model)
        assert isinstance(model[0], SomeRMSNorm)
        assert type(model[1]) is nn.Linear

    def test_another_activation_leaves_the_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, NativeLinear)
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="relu")).eval()
        before = logits(model)
        assert optimize(model).replaced == {"attention": 2, "native": 2 * 4 + 1, "rms norm": 5}
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_module_used_twice_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, OneDnnLinear)
    linear = nn.Linear(6, 6)
    inner = nn.Sequential(linear)
    model = nn.Sequential(linear, inner)
    report = optimize(model)
    assert isinstance(model[0], PackedLinear)
    assert model[0] is inner[0]
    assert report.replaced == {"onednn": 1}
