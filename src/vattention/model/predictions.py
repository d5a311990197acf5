"""What a forward pass foretells, for whoever chooses tokens: logits, or the largest of them without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vattention.model.gumbel import likeliest
from vattention.native import Largest, Noise


class Predictions(Protocol):
    """What a forward pass foretells: the rows of logits that its chunks asked for, computed as they are needed.

    Good until the model's next forward pass, which may use the same memory.
    """

    def __len__(self) -> int: ...

    def logits(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), V] float32, to be read until the next call of this model's predictions."""
        ...

    def likeliest(self, rows: Sequence[int], noise: Noise | None = None) -> Largest:
        """The first largest logit of each row, NaN counting as largest: its index and its value.

        Args:
            noise: of each of `rows`, added before logits are compared, and in the value.
        """
        ...


class GivenLogits:
    """Predictions from logits that are all there: [R, V] float32."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __len__(self) -> int:
        return len(self._logits)

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self._logits if list(rows) == list(range(len(self))) else self._logits[list(rows)]

    def likeliest(self, rows: Sequence[int], noise: Noise | None = None) -> Largest:
        return likeliest(self.logits(rows), noise)
