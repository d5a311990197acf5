"""Cosines and sines of rotary position embeddings, as a model makes them for its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Cosines and sines, [tokens, head_dim] each."""

_LEAST = 512
"""Positions in the first table."""


class RotaryTables:
    """A table for each kind of embedding that a model has, made as far as positions have come.

    Args:
        compute: the pairs of each kind for positions [n].
        max_len: positions there are.
    """

    def __init__(self, compute: Callable[[Tensor], Sequence[Pair]], max_len: int) -> None:
        self._compute = compute
        self._max_len = max_len
        self._len = 0
        self._tables: list[Pair] = []

    def rows(self, positions: Tensor, last: int) -> list[Pair]:
        """The pairs of each kind at these positions, none of which is beyond `last`."""
        if last >= self._len:
            self._grow(last + 1)
        return [(cosines[positions], sines[positions]) for cosines, sines in self._tables]

    def _grow(self, least: int) -> None:
        new = max(least, min(max(2 * self._len, _LEAST), self._max_len))
        more = self._compute(torch.arange(self._len, new))
        if self._tables:
            pairs = zip(self._tables, more, strict=True)
            more = [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), (c, d) in pairs]
        self._tables = list(more)
        self._len = new
