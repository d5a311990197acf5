from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tests.model.architectures import ARCHITECTURES, REFUSED
from vattention.errors import UnsupportedModelError
from vattention.model.hook import AttentionHook, implementation, set_implementation

TOKENS = torch.arange(3, 12).unsqueeze(0)


class Counter:
    """Attention that gives zeros and keeps the masks it was given."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []

    def __call__(
        self, module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        self.masks.append(mask)
        return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def registered() -> tuple[set[str], set[str]]:
    return set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())


def test_the_function_computes_every_layer_and_gets_no_mask() -> None:
    model = ARCHITECTURES["mistral"]()
    function = Counter()
    hook = AttentionHook(model, function)
    model(TOKENS, use_cache=False)
    hook.close()
    assert function.masks == [None] * 3


def test_a_mask_function_is_asked_for_masks() -> None:
    model = ARCHITECTURES["mistral"]()
    function, mask = Counter(), torch.ones(1, 1, 9, 9)
    hook = AttentionHook(model, function, lambda **_: mask)
    model(TOKENS, use_cache=False)
    hook.close()
    assert [given is mask for given in function.masks] == [True] * 3


def test_another_function_takes_over() -> None:
    model = ARCHITECTURES["mistral"]()
    before, functions = registered(), [Counter(), Counter()]
    hook = AttentionHook(model, functions[0])
    model(TOKENS, use_cache=False)
    hook.replace(functions[1])
    model(TOKENS, use_cache=False)
    hook.close()
    assert [len(function.masks) for function in functions] == [3, 3]
    assert registered() == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3n"])
def test_close_leaves_the_model_and_the_interfaces_as_they_were(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    before, name, logits = registered(), implementation(model), model(TOKENS, use_cache=False).logits
    hook = AttentionHook(model, Counter(), lambda **_: torch.ones(1, 1, 9, 9))
    assert registered() != before
    assert not model(TOKENS, use_cache=False).logits.equal(logits)
    hook.close()
    hook.close()
    assert registered() == before
    assert implementation(model) == name
    assert model(TOKENS, use_cache=False).logits.equal(logits)


def test_suspended_the_model_computes_by_itself() -> None:
    model = ARCHITECTURES["llama"]()
    logits = model(TOKENS, use_cache=False).logits
    function = Counter()
    hook = AttentionHook(model, function)
    with hook.suspended("eager"):
        assert model(TOKENS, use_cache=False).logits.equal(logits)
    assert function.masks == []
    model(TOKENS, use_cache=False)
    assert len(function.masks) == 3
    hook.close()


def test_hooks_of_two_models_do_not_meet() -> None:
    models = ARCHITECTURES["llama"](), ARCHITECTURES["llama"]()
    functions = Counter(), Counter()
    hooks = [AttentionHook(model, function) for model, function in zip(models, functions, strict=True)]
    models[0](TOKENS, use_cache=False)
    assert [len(function.masks) for function in functions] == [3, 0]
    for hook in hooks:
        hook.close()


def test_a_refusal_leaves_nothing_registered() -> None:
    before = registered()
    with pytest.raises(UnsupportedModelError, match="computes its attention itself"):
        AttentionHook(REFUSED["falcon"][0](), Counter())
    assert registered() == before


def test_models_outside_the_interface_cannot_be_switched() -> None:
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        set_implementation(REFUSED["bloom"][0](), "sdpa")
