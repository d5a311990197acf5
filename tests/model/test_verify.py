from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.attention.dense import DenseManager
from tests.model.architectures import ARCHITECTURES, MAX_LEN
from vattention.errors import UnsupportedModelError
from vattention.model import verify as subject
from vattention.model.probe import ModelAttention, probe
from vattention.model.runner import ModelRunner
from vattention.model.verify import verify


@contextmanager
def running(
    model: PreTrainedModel,
    change: Callable[[ModelAttention], ModelAttention] = lambda attention: attention,
    *,
    num_slots: int = 2,
    max_len: int = MAX_LEN,
) -> Iterator[tuple[ModelRunner, DenseManager]]:
    attention = change(probe(model))
    kv = DenseManager(attention.cache_specs, num_slots=num_slots, max_len=max_len, dtype=model.dtype)
    runner = ModelRunner(model, attention, kv)
    try:
        yield runner, kv
    finally:
        runner.close()


def with_specs(**changes: Any) -> Callable[[ModelAttention], ModelAttention]:
    def change(attention: ModelAttention) -> ModelAttention:
        layers = tuple(replace(layer, spec=replace(layer.spec, **changes)) for layer in attention.layers)
        return ModelAttention(layers)

    return change


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_works_passes(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    with running(model) as (runner, kv):
        assert verify(model, runner, kv) < 1e-5
        assert kv.num_free_slots == kv.num_slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_half_precision_passes(architecture: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[architecture]().to(dtype)
    with running(model) as (runner, kv):
        assert verify(model, runner, kv) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("mistral", {"window": None}),
        ("llama", {"window": 8}),
        ("gemma2", {"softcap": None}),
        ("gpt-oss", {"has_sinks": False}),
        ("opt", {"scale": 8**-0.5}),
    ],
)
def test_a_wrong_feature_is_refused(architecture: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = ARCHITECTURES[architecture]().to(dtype)
    with (
        running(model, with_specs(**changes)) as (runner, kv),
        pytest.raises(UnsupportedModelError, match=r"ForCausalLM .*differ by .* of their norm, and .* is allowed"),
    ):
        verify(model, runner, kv)


def test_slots_come_back_when_it_fails() -> None:
    model = ARCHITECTURES["opt"]()
    with running(model, with_specs(scale=1e6)) as (runner, kv):
        with pytest.raises(UnsupportedModelError):
            verify(model, runner, kv)
        assert kv.num_free_slots == kv.num_slots


def test_nan_is_a_difference() -> None:
    model = ARCHITECTURES["llama"]()
    with running(model, with_specs(scale=float("nan"))) as (runner, kv), pytest.raises(UnsupportedModelError):
        verify(model, runner, kv)


@pytest.mark.parametrize("position", range(3))
def test_nan_in_one_of_three_is_a_difference(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [float("nan") if index == position else 0.0 for index in range(3)]
    monkeypatch.setattr(subject, "_difference_through", lambda *_: differences.pop())
    model = ARCHITECTURES["llama"]()
    with running(model) as (runner, kv), pytest.raises(UnsupportedModelError, match="differ by nan"):
        verify(model, runner, kv)


@pytest.mark.parametrize(("num_slots", "max_len"), [(1, MAX_LEN), (2, 3), (1, 1)])
def test_small_caches_do(num_slots: int, max_len: int) -> None:
    model = ARCHITECTURES["llama"]()
    with running(model, num_slots=num_slots, max_len=max_len) as (runner, kv):
        assert verify(model, runner, kv) < 1e-5


def test_a_state_between_tokens_shows() -> None:
    """A layer that mixes neighbouring tokens outside attention is right in no batch and no chunk."""
    model = ARCHITECTURES["llama"]()

    def mix(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + torch.roll(output, 1, dims=1)

    model.model.layers[1].mlp.register_forward_hook(mix)
    with running(model) as (runner, kv), pytest.raises(UnsupportedModelError, match="differ"):
        verify(model, runner, kv)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or infinite"), (0.0, "nothing but equal")])
def test_damaged_weights_are_not_mistaken_for_a_wrong_cache(value: float, said: str) -> None:
    model = ARCHITECTURES["llama"]()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    with running(model) as (runner, kv), pytest.raises(UnsupportedModelError, match=f"{said} logits by itself"):
        verify(model, runner, kv)
