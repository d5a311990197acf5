"""What a forward pass foretells, for whoever chooses tokens: logits, or the likeliest tokens without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vattention.native import Largest


class Predictions(Protocol):
    """What a forward pass foretells: the rows of logits that its chunks asked for, computed as they are needed."""

    def __len__(self) -> int: ...

    def logits(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), V] float32, to be read until the next call of this model's predictions."""
        ...

    def likeliest(self, rows: Sequence[int]) -> Largest:
        """The first largest logit of each row, NaN counting as largest: its index and its value."""
        ...


class GivenLogits:
    """Predictions from logits that are all there: [R, V] float32."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __len__(self) -> int:
        return len(self._logits)

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self._logits if list(rows) == list(range(len(self))) else self._logits[list(rows)]

    def likeliest(self, rows: Sequence[int]) -> Largest:
        logits = self.logits(rows)
        if logits.is_cuda:
            largest, token_ids = logits.max(dim=-1)
            return token_ids.cpu().numpy(), largest.cpu().numpy()
        array: NDArray[np.float32] = logits.detach().numpy()
        ids = array.argmax(axis=-1)  # several times faster than torch's on a CPU
        return ids, array[np.arange(len(ids)), ids]
