"""A KV cache of plain tensors, full of NaN wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.core import AttentionSpec
from vattention.kv.manager import Accounts, LayerView, Placement


class DenseManager:
    """`KVManager` that maps nothing: all memory is there from the beginning, as NaN.

    What a layer's window leaves behind becomes NaN again, as do released and trimmed tokens: whoever reads what he
    must not gets NaN for an answer.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        *,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        def nans(num_heads: int, dim: int) -> torch.Tensor:
            return torch.full((num_slots, max_len, num_heads, dim), float("nan"), dtype=dtype, device=device)

        self.specs = tuple(specs)
        self.num_slots = num_slots
        self.max_len = max_len
        self._views = tuple(
            LayerView(nans(spec.num_kv_heads, spec.key_dim), nans(spec.num_kv_heads, spec.value_dim))
            for spec in specs
        )
        self._free = list(range(num_slots))[::-1]

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def excess_nbytes(self) -> int:
        return 0

    def layer(self, index: int) -> LayerView:
        return self._views[index]

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        return Placement(self._free.pop(), 0)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        return False

    def computed(self, slot: int, num_tokens: int) -> None:
        """Nobody asks for prefixes."""

    def fork(self, slot: int, num_tokens: int) -> int:
        other = self._free.pop()
        for view in self._views:
            view.keys[other, :num_tokens] = view.keys[slot, :num_tokens]
            view.values[other, :num_tokens] = view.values[slot, :num_tokens]
        return other

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        tensors = [tensor for view in self._views for tensor in (view.keys, view.values)]
        return [tensor[slot, :num_tokens].view(torch.uint8) for tensor in tensors]

    def ensure(self, slot: int, start: int, end: int) -> None:
        assert end <= self.max_len
        for spec, view in zip(self.specs, self._views, strict=True):
            if spec.window is not None:
                self._forget(view, slot, 0, max(0, start - spec.window + 1))

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Nothing to do ahead."""

    def trim(self, slot: int, num_tokens: int) -> None:
        for view in self._views:
            self._forget(view, slot, num_tokens, self.max_len)

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        self.trim(slot, 0)
        self._free.append(slot)

    def drop_warm(self) -> None:
        """Nothing is warm."""

    def set_limit(self, nbytes: int) -> None:
        """Nothing is limited."""

    def refresh_limit(self) -> None:
        """Nothing is limited."""

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_len

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        return bool(self._free)

    def accounts(self) -> Accounts:
        return Accounts(0, 0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        self._views = ()

    @staticmethod
    def _forget(view: LayerView, slot: int, start: int, end: int) -> None:
        view.keys[slot, start:end] = float("nan")
        view.values[slot, start:end] = float("nan")
