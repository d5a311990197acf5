from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.architectures import ARCHITECTURES, REFUSED, VOCAB_SIZE, WINDOW
from vattention.core import AttentionSpec
from vattention.errors import UnsupportedModelError
from vattention.model.hook import implementation
from vattention.model.masks import Masks
from vattention.model.probe import AttentionLayer, ModelAttention, probe

W = WINDOW


@pytest.mark.parametrize(
    ("architecture", "specs"),
    [
        ("llama", [AttentionSpec(4, 2, 8, 8, 8**-0.5)] * 3),
        ("mistral", [AttentionSpec(4, 2, 8, 8, 8**-0.5, window=W)] * 3),
        ("qwen2-window", [AttentionSpec(4, 2, 8, 8, 8**-0.5, window=w) for w in (None, W, W)]),
        ("gemma2", [AttentionSpec(4, 2, 16, 16, 0.5, window=w, softcap=2.0) for w in (W, None, W)]),
        ("gemma3", [AttentionSpec(4, 2, 16, 16, 0.5, window=w) for w in (W, None, W)]),
        ("gpt-oss", [AttentionSpec(4, 2, 16, 16, 0.25, window=w, has_sinks=True) for w in (W, None, W)]),
        ("gpt2", [AttentionSpec(4, 4, 8, 8, 8**-0.5 / divisor) for divisor in (1, 2, 3)]),
        ("opt", [AttentionSpec(4, 4, 8, 8, 1.0)] * 3),
        ("deepseek-v3", [AttentionSpec(4, 4, 16, 12, 0.25)] * 3),
    ],
)
def test_finds_what_each_layer_computes(architecture: str, specs: list[AttentionSpec]) -> None:
    attention = probe(ARCHITECTURES[architecture]())
    found = [layer.spec for layer in attention.layers]
    assert [spec.scale for spec in found] == pytest.approx([spec.scale for spec in specs])
    assert found == [
        AttentionSpec(
            spec.num_heads,
            spec.num_kv_heads,
            spec.key_dim,
            spec.value_dim,
            real.scale,
            spec.window,
            spec.softcap,
            spec.has_sinks,
        )
        for spec, real in zip(specs, found, strict=True)
    ]
    assert attention.cache_specs == found


def test_a_window_is_found_where_only_the_mask_has_it() -> None:
    model = ARCHITECTURES["qwen2-moe"]()
    assert [layer.spec.window for layer in probe(model).layers] == [
        WINDOW if kind == "sliding_attention" else None for kind in model.config.layer_types
    ]


def test_layers_that_reuse_keys_and_values_store_nothing() -> None:
    attention = probe(ARCHITECTURES["gemma3n"]())
    assert [(layer.cache_layer, layer.writes) for layer in attention.layers] == [
        (0, True),
        (1, True),
        (2, True),
        (3, True),
        (2, False),
        (3, False),
    ]
    assert len(attention.cache_specs) == 4


def test_the_cache_keeps_the_widest_window_that_is_read() -> None:
    def layer(window: int | None, writes: bool) -> AttentionLayer:
        return AttentionLayer("", AttentionSpec(4, 4, 8, 8, 1.0, window=window), 0, writes)

    assert ModelAttention((layer(8, True), layer(20, False))).cache_specs[0].window == 20
    assert ModelAttention((layer(8, True), layer(None, False))).cache_specs[0].window is None
    assert ModelAttention((layer(None, True), layer(8, False))).cache_specs[0].window is None


def test_leaves_the_model_as_it_was() -> None:
    model = ARCHITECTURES["llama"]()
    name = implementation(model)
    probe(model)
    assert implementation(model) == name


@pytest.mark.parametrize("architecture", REFUSED)
def test_refuses_what_it_cannot_serve(architecture: str) -> None:
    build, reason = REFUSED[architecture]
    model = build()
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*({reason})"):
        probe(model)


def changed(change: Callable[[dict[str, Any]], Any], every: int = 1) -> PreTrainedModel:
    """A Llama whose attention modules change the keywords they are called with."""
    model = ARCHITECTURES["llama"]()
    for layer in model.model.layers[::every]:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, keywords: (args, keywords | change(keywords)), with_kwargs=True
        )
    return model


def test_refuses_keywords_it_does_not_know() -> None:
    with pytest.raises(UnsupportedModelError, match=r"passes 'position_bias' to the attention of model\.layers\.0"):
        probe(changed(lambda _: {"position_bias": torch.zeros(1)}))


def test_unknown_keywords_without_a_value_do_not_matter() -> None:
    assert len(probe(changed(lambda _: {"position_bias": None})).layers) == 3


def test_refuses_masks_of_the_models_own_making() -> None:
    with pytest.raises(UnsupportedModelError, match="a mask of its own making"):
        probe(changed(lambda keywords: {"attention_mask": torch.ones(1, 1, 8, 8)}))


def test_refuses_bidirectional_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="not causal"):
        probe(changed(lambda _: {"attention_mask": None, "is_causal": False}))


def test_refuses_layers_without_attention() -> None:
    model = ARCHITECTURES["llama"]()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match=r"has 3 layers, .* called 2 times"):
        probe(model)


def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


@pytest.mark.parametrize("window", [1, 2, 7, 512, 8191])
def test_masks_show_their_window(window: int) -> None:
    masks = Masks(ARCHITECTURES["llama"]())
    mask = masks.create(
        batch_size=1,
        q_length=4,
        kv_length=4,
        mask_function=lambda b, h, q, k: (k <= q) & (k > q - window),
    )
    assert mask.shape == (1, 1, 4, 4)
    assert masks.window(mask, None, "layer") == window


def test_a_causal_mask_has_no_window() -> None:
    masks = Masks(ARCHITECTURES["llama"]())
    mask = masks.create(batch_size=1, q_length=4, kv_length=4, mask_function=causal)
    assert masks.window(mask, 5, "layer") is None


def test_without_a_mask_the_keyword_speaks() -> None:
    masks = Masks(ARCHITECTURES["llama"]())
    assert masks.window(None, 5, "layer") == 5
    assert masks.window(None, None, "layer") is None


@pytest.mark.parametrize(
    "visible",
    [
        lambda b, h, q, k: (k <= q) & (k // 8 == q // 8),
        lambda b, h, q, k: (k <= q) & (k // 4096 == q // 4096),
        lambda b, h, q, k: k <= q + 1,
        lambda b, h, q, k: (k <= q) & ((k > q - 8) | (k < 4)),
        lambda b, h, q, k: (k < q) & (k > q - 8),
        lambda b, h, q, k: k < 0,
    ],
    ids=["chunked", "coarsely chunked", "bidirectional", "first tokens stay", "not itself", "nothing"],
)
def test_other_masks_are_refused(visible: Callable[..., torch.Tensor]) -> None:
    masks = Masks(ARCHITECTURES["llama"]())
    with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
        masks.create(batch_size=1, q_length=4, kv_length=4, mask_function=visible)


def test_vocabularies_smaller_than_the_prompt_do() -> None:
    assert VOCAB_SIZE > 8
    model = ARCHITECTURES["llama"]()
    model.resize_token_embeddings(5)
    assert len(probe(model).layers) == 3
