"""What a model's attention computes, learnt by running it once.

No flag of a configuration tells it reliably, and names differ from model to model. So a short prompt goes through
the model with an attention function that notes what it is given. Windows come from the masks that the model asks
for, not from keyword arguments: the masks decide what `model.generate` computes, and some models pass nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from vattention.attention.eager import EagerKernel
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.errors import UnsupportedModelError
from vattention.kv.manager import LayerView
from vattention.model.hook import AttentionHook
from vattention.model.masks import Masks

_PROMPT_LEN = 8

_SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "softcap",
        "s_aux",
        "use_cache",
    }
)
"""Keywords of an attention call that are read here, or say nothing about its result."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer's attention.

    Attributes:
        name: of its module inside the model, such as "model.layers.0.self_attn".
        spec: what it computes.
        cache_layer: the layer of the KV cache that holds its keys and values.
        writes: whether it stores them itself, or reuses those that an earlier layer stored.
    """

    name: str
    spec: AttentionSpec
    cache_layer: int
    writes: bool


@dataclass(frozen=True, slots=True)
class ModelAttention:
    """A model's attention layers, in the order in which a forward pass calls them."""

    layers: tuple[AttentionLayer, ...]

    @property
    def cache_specs(self) -> list[AttentionSpec]:
        """What the KV cache must hold, layer by layer: a layer's window is the widest of all that read it."""
        specs = [layer.spec for layer in self.layers if layer.writes]
        for layer in self.layers:
            window = specs[layer.cache_layer].window
            if window is not None and (layer.spec.window is None or layer.spec.window > window):
                specs[layer.cache_layer] = replace(specs[layer.cache_layer], window=layer.spec.window)
        return specs


def probe(model: PreTrainedModel) -> ModelAttention:
    """Find out what each layer's attention computes.

    Raises:
        UnsupportedModelError: something in it cannot be computed over this KV cache; the message says what.
    """
    _check_config(model)
    recorder = _Recorder(model)
    hook = AttentionHook(model, recorder.attend, recorder.masks.create)
    try:
        vocab_size = model.get_input_embeddings().num_embeddings
        tokens = torch.arange(_PROMPT_LEN, device=model.device).remainder(vocab_size).unsqueeze(0)
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    finally:
        hook.close()
    recorder.check_calls(model.config.get_text_config().num_hidden_layers)
    return ModelAttention(tuple(recorder.layers))


def _check_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models can be served")
    if others := set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYER_TYPES:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(others))}; only full and sliding-window attention keep "
            "their state in this KV cache"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} keeps a recurrent or convolutional state between tokens, which this KV cache has no place for"
        )


class _Recorder:
    """An attention function that computes plain attention and notes one `AttentionLayer` per call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers: list[AttentionLayer] = []
        self.masks = Masks(model)
        self._model_name = type(model).__name__
        self._names = {module: name for name, module in model.named_modules()}
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kernel = EagerKernel()

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        name = self._names[module]
        if any(layer.name == name for layer in self.layers):
            raise UnsupportedModelError(
                f"{self._model_name} calls the attention of {name} more than once in a forward pass, as "
                "differential or nested attention does"
            )
        for keyword, given in keywords.items():
            if given is not None and keyword not in _HARMLESS:
                raise UnsupportedModelError(
                    f"{self._model_name} passes {keyword!r} to the attention of {name}, whose meaning is not "
                    "known here"
                )
        if attention_mask is None and keywords.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise UnsupportedModelError(f"the attention of {name} is not causal: its tokens see those after them")
        scale, softcap, sinks = (keywords.get(keyword) for keyword in ("scaling", "softcap", "s_aux"))
        spec = AttentionSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=float(scale) if scale is not None else query.shape[3] ** -0.5,
            window=self.masks.window(attention_mask, keywords.get("sliding_window"), name),
            softcap=float(softcap) if softcap is not None else None,
            has_sinks=sinks is not None,
        )
        if key.shape[2] != query.shape[2] or spec.num_heads % spec.num_kv_heads:
            raise UnsupportedModelError(
                f"the attention of {name} gets {query.shape[1]} heads of {query.shape[2]} queries and "
                f"{key.shape[1]} heads of {key.shape[2]} keys; every token must bring its own key, for a whole "
                "number of query heads"
            )
        owner = next((i for i, stored in enumerate(self._stored) if _same(stored, (key, value))), None)
        if owner is None:
            self._stored.append((key, value))
        cache_layer = len(self._stored) - 1 if owner is None else owner
        self.layers.append(AttentionLayer(name, spec, cache_layer, writes=owner is None))

        view = LayerView(key.transpose(1, 2), value.transpose(1, 2))
        batch = RaggedBatch(((0, 0, query.shape[2], 0),))
        return self._kernel(query[0].transpose(0, 1), view, batch, spec, sinks).unsqueeze(0), None

    def check_calls(self, num_layers: int) -> None:
        if len(self.layers) != num_layers:
            raise UnsupportedModelError(
                f"{self._model_name} has {num_layers} layers, but the attention interface was called "
                f"{len(self.layers)} times in a forward pass; each layer must call it exactly once"
            )


def _same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether two pairs of tensors are the same memory."""
    return all(
        x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
        for x, y in zip(a, b, strict=True)
    )
