"""Reading sliding windows off the masks that a model asks transformers for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from vattention.errors import UnsupportedModelError

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query position, key position) → whether the query sees the key; broadcasts."""

_LONGEST = 1 << 20


class Masks:
    """A mask function for transformers' mask interface that remembers what each mask means.

    Args:
        model: masks are examined up to its longest position.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self._name = type(model).__name__
        self._horizon = min(max(getattr(config, "max_position_embeddings", None) or 0, 1 << 13), _LONGEST)
        self._made: dict[int, tuple[torch.Tensor, int | None]] = {}

    def create(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: MaskFunction,
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> torch.Tensor:
        """A mask [batch_size, 1, q_length, kv_length] of True; what it stands for is looked up by its memory."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
        self._made[mask.data_ptr()] = mask, self._examine(mask_function, torch.device(device))
        return mask

    def window(self, mask: torch.Tensor | None, keyword: int | None, layer: str) -> int | None:
        """The window of a layer that was given `mask`; `keyword` speaks where the model asked for no mask.

        Raises:
            UnsupportedModelError: the mask was not made by `create`.
        """
        if mask is None:
            return None if keyword is None else int(keyword)
        if mask.data_ptr() not in self._made:
            raise UnsupportedModelError(
                f"{self._name} gives the attention of {layer} a mask of its own making, whose meaning is "
                "not known here"
            )
        return self._made[mask.data_ptr()][1]

    def _examine(self, visible: MaskFunction, device: torch.device) -> int | None:
        """The window of a causal mask, None for full attention.

        Raises:
            UnsupportedModelError: what some query sees is not the same number of last keys.
        """
        window = self._seen(visible, self._horizon - 1, device)
        for query in {0, 1, 2, 3, 5, 100, 1000, 4097, self._horizon // 3, self._horizon // 2 + 1}:
            if query < self._horizon and self._seen(visible, query, device) != min(window, query + 1):
                raise self._unusual(query)
        return None if window == self._horizon else window

    def _seen(self, visible: MaskFunction, query: int, device: torch.device) -> int:
        """How many keys the query at this position sees, if these are the last ones."""
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        keys = torch.arange(query + 2, device=device)
        seen = visible(zero, zero, torch.full_like(keys, query), keys).expand(len(keys))
        count = int(seen.sum())
        if count == 0 or bool(seen[-1]) or not bool(seen[query + 1 - count : query + 1].all()):
            raise self._unusual(query)
        return count

    def _unusual(self, query: int) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._name} masks its attention in a way that is neither causal nor a sliding window (seen at "
            f"position {query}), as chunked or bidirectional attention does"
        )
