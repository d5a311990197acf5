"""A model's attention in one forward pass after the other: the function that transformers calls, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vattention.attention.compiled import CompiledKernel
from vattention.attention.kernel import AttentionKernel, RaggedBatch
from vattention.core import AttentionSpec
from vattention.errors import UnsupportedModelError
from vattention.kv.manager import CacheView
from vattention.native import AttentionCache


@dataclass(frozen=True, slots=True)
class Place:
    """One attention layer over its share of the cache.

    Attributes:
        index: when in a forward pass it is due.
        writes: whether it stores keys and values, or reads those that an earlier layer stored.
    """

    index: int
    spec: AttentionSpec
    view: CacheView
    writes: bool
    kernel: AttentionKernel[Any]


class BatchAttention:
    """Computes the attention of the batch that was begun; each layer must ask once, in order.

    Attributes:
        places: of the model's attention modules.
    """

    def __init__(self, places: Mapping[nn.Module, Place]) -> None:
        self.places = places
        self._batch: RaggedBatch | None = None
        self._num_attended = 0
        self._caches: dict[nn.Module, AttentionCache] = {}
        for module, place in places.items():
            if isinstance(place.kernel, CompiledKernel) and place.writes and not place.spec.has_sinks:
                self._caches[module] = place.kernel.cache(place.view)

    def begin(self, batch: RaggedBatch) -> None:
        self._batch, self._num_attended = batch, 0

    def end(self) -> None:
        """No layer may ask any more."""
        self._batch = None

    @property
    def num_attended(self) -> int:
        """Layers that have asked."""
        return self._num_attended

    def claim(
        self, module: nn.Module, dtype: torch.dtype, prefills: bool
    ) -> tuple[AttentionCache, RaggedBatch] | None:
        """The layer's turn, for a caller that stores keys and values and attends itself, with the compiled kernel.

        None where it cannot: a sequence brings more than one token and the caller does not prefill, the layer's
        kernel is another, or its cache is not of the caller's type.
        """
        cache = self.cache(module, dtype)
        if cache is None or self._batch is None or not (prefills or self._batch.is_decode):
            return None
        self._turn(module)
        return cache, self._batch

    def cache(self, module: nn.Module, dtype: torch.dtype) -> AttentionCache | None:
        """The layer's cache for a caller like `claim`'s, if it can be had at all."""
        cache = self._caches.get(module)
        return cache if cache is not None and self.places[module].view.keys.dtype == dtype else None

    def claim_all(self) -> None:
        """The turns of all layers of a forward pass."""
        self._due(0)
        self._num_attended = len(self.places)

    def _turn(self, module: nn.Module) -> tuple[Place, RaggedBatch]:
        place = self.places[module]
        batch = self._due(place.index)
        self._num_attended += 1
        return place, batch

    def _due(self, index: int) -> RaggedBatch:
        """The batch, whose layer of this index is the next."""
        if self._batch is None or index != self._num_attended:
            raise UnsupportedModelError(
                f"attention layer {index} was called out of turn: layer {self._num_attended} of a forward "
                "pass of the runner was due"
            )
        return self._batch

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: query [1, H, T, D] and so on, to [1, T, H, value_dim]."""
        place, batch = self._turn(module)
        if place.writes:
            place.view.append(key[0].transpose(0, 1), value[0].transpose(0, 1), batch.slots, batch.positions)
        sinks = s_aux if place.spec.has_sinks else None
        return place.kernel(query[0].transpose(0, 1), place.view, batch, place.spec, sinks).unsqueeze(0), None
