"""`VirtualCache`: this project's memory for people who stay with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from vattention.errors import ConfigError, UnsupportedModelError
from vattention.hf.growing import CacheMemory
from vattention.hf.layers import VirtualLayer, VirtualSlidingLayer


class VirtualCache(Cache):  # type: ignore[misc]
    """A cache for transformers models whose keys and values grow in place.

    Where `DynamicCache` copies everything into a larger tensor for each token, and `StaticCache` takes the memory
    for the longest sequence beforehand, this one reserves *addresses* for the longest sequence and puts memory
    behind them as tokens come. What attention sees are plain tensors, whatever the kernel.

    >>> cache = VirtualCache(model.config)
    >>> tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=32)
    >>> 0 < cache.mapped_nbytes < cache.reserved_nbytes
    True

    The batch is learnt from the first update; `reset` makes the cache ready for another. Beams, drafts that are
    rolled back, sliding windows, conversations that go on, copies and pickles work as with `DynamicCache`. Tensors
    that came out of the cache keep their memory alive, but are views into it: the next call that changes the cache
    may change them too. It is for inference: no gradient flows through it.

    Args:
        config: the model's.
        max_length: most tokens of a sequence, prompt and output together; by default the model's
            `max_position_embeddings`.
        page_nbytes: bytes of a page; by default the smallest there is.
        limit_nbytes: most physical memory to use on each device; by default what is available at first use.

    Raises:
        ConfigError: the model's configuration has no maximum length, and none was given.
        UnsupportedModelError: layers keep more than keys and values in tensors that grow.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_length: int | None = None,
        page_nbytes: int | None = None,
        limit_nbytes: int | None = None,
    ) -> None:
        length = max_length
        if length is None:
            length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"max_length is {max_length} and {type(config).__name__} has no max_position_embeddings; give "
                "VirtualCache a max_length of at least 1"
            )
        self.max_length = length
        memory = CacheMemory(page_nbytes, limit_nbytes)
        # Which layer is of which kind is transformers' knowledge, and how it is told differs between versions.
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[_virtual(layer, memory, length) for layer in layers])

    @property
    def mapped_nbytes(self) -> int:
        """Physical memory behind the cache now, in bytes."""
        return sum(layer.mapped_nbytes for layer in self._virtual_layers())

    @property
    def reserved_nbytes(self) -> int:
        """Addresses the cache may grow into, in bytes; 0 before the first update."""
        return sum(layer.reserved_nbytes for layer in self._virtual_layers())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i of each layer be what row `beam_idx[i]` was, for beam search."""
        super().reorder_cache(beam_idx.cpu())

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring the next offloaded layer back, from `layer_idx` on and around."""
        layers = [*self.layers[layer_idx:], *self.layers[:layer_idx]]
        for layer in layers:
            if (
                isinstance(layer, VirtualLayer)
                and layer.is_offloaded
                and not (only_non_sliding and layer.is_sliding)
            ):
                layer.prefetch()
                return

    def _virtual_layers(self) -> Iterator[VirtualLayer]:
        return (layer for layer in self.layers if isinstance(layer, VirtualLayer))


def _virtual(layer: Any, memory: CacheMemory, max_length: int) -> Any:
    """The layer that takes the place of transformers' dynamic `layer`.

    Layers without keys and values (shared, or linear attention with a state of fixed size) stay as they are.
    """
    if type(layer) is DynamicLayer:
        return VirtualLayer(memory, max_length)
    if type(layer) is DynamicSlidingWindowLayer:
        return VirtualSlidingLayer(memory, max_length, layer.sliding_window)
    if not isinstance(layer, CacheLayerMixin):
        return layer
    raise UnsupportedModelError(
        f"VirtualCache holds full and sliding-window attention, and this model needs a {type(layer).__name__}; use "
        "transformers' DynamicCache for it"
    )
