"""Keys and values per layer and token, as any manager with any layout can take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.core import AttentionSpec
from vattention.kv.manager import KVManager


class LayerImage:
    """A `vattention.kv.swap.Image` that does not depend on where a cache puts a token.

    Args:
        num_tokens: the sequence's first tokens that it stands for.
        layers: keys and values per layer, [n, num_kv_heads, dim] each: the last n of those tokens, which are those
            that the next token still reads.
    """

    def __init__(self, num_tokens: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.num_tokens = num_tokens
        self.layers = tuple(layers)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @classmethod
    def of(cls, manager: KVManager, specs: Sequence[AttentionSpec], slot: int, num_tokens: int) -> LayerImage:
        """Copy a slot's first tokens out of the cache. `specs` are the cache's layers."""
        layers = []
        for index, spec in enumerate(specs):
            view = manager.layer(index)
            positions = torch.arange(_first_needed(spec, num_tokens), num_tokens, device=view.keys.device)
            layers.append(view.read(slot, positions))
        return cls(num_tokens, layers)

    def load(self, manager: KVManager, slot: int) -> None:
        for index, (keys, values) in enumerate(self.layers):
            view = manager.layer(index)
            device = view.keys.device
            positions = torch.arange(self.num_tokens - len(keys), self.num_tokens, device=device)
            view.append(keys.to(device), values.to(device), torch.full_like(positions, slot), positions)

    def free(self) -> None:
        self.layers = ()

    def fits(self, manager: KVManager, specs: Sequence[AttentionSpec]) -> bool:
        """Whether a cache with these layers stores such keys and values."""
        return self.num_tokens <= manager.max_len and [
            (keys.shape, values.shape, keys.dtype, values.dtype) for keys, values in self.layers
        ] == [_expected(manager, index, spec, self.num_tokens) for index, spec in enumerate(specs)]


def _first_needed(spec: AttentionSpec, num_tokens: int) -> int:
    return 0 if spec.window is None else max(0, num_tokens - spec.window + 1)


def _expected(
    manager: KVManager, index: int, spec: AttentionSpec, num_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.dtype]:
    count = num_tokens - _first_needed(spec, num_tokens)
    view = manager.layer(index)
    shapes = (count, *view.keys.shape[-2:]), (count, *view.values.shape[-2:])
    return (*shapes, view.keys.dtype, view.values.dtype)
