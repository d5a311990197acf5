"""Cutting one sequence's share of a batch into blocks of query rows, each with the keys it reads.

Both reasons are memory: scores or a mask of a whole chunk against a long history would outgrow the cache itself,
and under a sliding window most of them would be masked anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

_KEPT_NUMBERS = 1 << 20
"""Largest mask that is kept for the next layer: that of a window of some thousand tokens."""


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows [first_row, first_row + num_rows) of a batch, and the keys that any of them may see.

    Attributes:
        position: of the first row's token in its sequence.
        first_key: position of the first key to read: under a window nothing before it may be touched, because its
            memory may be gone.
        window: as in `AttentionSpec`.
    """

    first_row: int
    num_rows: int
    position: int
    first_key: int
    window: int | None

    @property
    def end_key(self) -> int:
        """One past the last key: the last row's own token."""
        return self.position + self.num_rows

    @property
    def num_keys(self) -> int:
        return self.end_key - self.first_key

    @property
    def sees_all(self) -> bool:
        """Whether every row sees every key of the block, so that nothing needs masking."""
        return self.num_rows == 1

    @property
    def is_causal_square(self) -> bool:
        """Whether row i sees exactly keys [0, i] of the block: causal without history, and no window cuts in."""
        return self.num_rows == self.num_keys and (self.window is None or self.num_rows <= self.window)

    def visible(self, device: torch.device) -> torch.Tensor:
        """[num_rows, num_keys] bool: which keys each row sees, aligned at the lower right corner."""
        return _visible(self.num_rows, self.num_keys, self.window, device)

    def mask(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The same to be added to scores: 0 or -inf."""
        # Under a window the blocks of a long chunk are alike, in all layers.
        is_kept = self.window is not None and self.num_rows * self.num_keys <= _KEPT_NUMBERS
        masks = _kept_mask if is_kept else _mask
        return masks(self.num_rows, self.num_keys, self.window, device, dtype)


def _visible(num_rows: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    rows = torch.arange(num_keys - num_rows, num_keys, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device).unsqueeze(0)
    seen = keys <= rows
    return seen if window is None else seen & (keys > rows - window)


def _mask(
    num_rows: int, num_keys: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    seen = _visible(num_rows, num_keys, window, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


_kept_mask = lru_cache(maxsize=4)(_mask)


def blocks(first_row: int, num_rows: int, start: int, window: int | None, max_scores: int) -> Iterator[Block]:
    """Cut `num_rows` rows at positions [start, start + num_rows) into blocks of about `max_scores` scores per head.

    A chunk without history or window is one block if it alone has no more than that many.
    """
    end = start + num_rows
    most_keys = end if window is None else min(end, 2 * window)
    step = max(1, max_scores // most_keys)
    if window is not None and end > window:
        # Half of a window masks fewer scores than a whole one, and is still a large product.
        step = min(step, max(1, window // 2))
    for position in range(start, end, step):
        first_key = 0 if window is None else max(0, position - window + 1)
        yield Block(first_row + position - start, min(step, end - position), position, first_key, window)
