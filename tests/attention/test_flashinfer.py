"""What FlashInfer is told of a batch, over a fake of it; `test_kernels.py` has what it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.fake_libraries import FLASHINFER
from vattention.attention.flashinfer import FlashInferKernel
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import LayerView


class Plans:
    """Modules whose wrappers keep what `plan` was given."""

    def __init__(self) -> None:
        self.pages: list[tuple[list[int], list[int], list[int], int]] = []
        self.module = SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=self._keeping(FLASHINFER.BatchDecodeWithPagedKVCacheWrapper, 0),
            BatchPrefillWithPagedKVCacheWrapper=self._keeping(FLASHINFER.BatchPrefillWithPagedKVCacheWrapper, 1),
        )

    def _keeping(self, wrapper: Any, skipped: int) -> Any:
        kept = self.pages

        class Keeping(wrapper):  # type: ignore[misc]
            def plan(self, *arguments: Any, **settings: Any) -> None:
                starts, entries, last, *_, size = arguments[skipped:]
                kept.append((starts.tolist(), entries.tolist(), last.tolist(), size))
                super().plan(*arguments, **settings)

        return Keeping


@pytest.fixture
def plans() -> Plans:
    return Plans()


def attend(plans: Plans, chunks: list[Chunk], max_len: int, window: int | None = None) -> None:
    spec = AttentionSpec(4, 2, 64, 64, 0.125, window=window)
    keys, values = torch.randn(2, 4, max_len, 2, 64, dtype=torch.bfloat16)
    batch = RaggedBatch.of(chunks)
    kernel = FlashInferKernel(lambda: plans.module, "cpu")
    query = torch.randn(len(batch.slots), 4, 64, dtype=torch.bfloat16)
    kernel(query, LayerView(keys, values), batch, spec, None)


def test_slots_are_pages_small_enough_to_be_split_between(plans: Plans) -> None:
    attend(plans, [Chunk(2, 300, [0], 0), Chunk(0, 127, [0], 0)], max_len=512)
    assert plans.pages == [([0, 3, 4], [8, 9, 10, 0], [301 - 256, 128], 128)]


def test_pages_divide_slots(plans: Plans) -> None:
    attend(plans, [Chunk(1, 50, [0], 0)], max_len=96)
    assert plans.pages == [([0, 2], [3, 4], [19], 32)]


def test_under_a_window_nothing_before_it_is_in_a_page(plans: Plans) -> None:
    attend(plans, [Chunk(1, 9, [0], 0), Chunk(3, 20, [0, 0], 0)], max_len=256, window=4)
    decodes, others = plans.pages
    assert decodes == ([0, 4], [256 + 6, 256 + 7, 256 + 8, 256 + 9], [1], 1)
    assert others == ([0, 5], [768 + at for at in range(17, 22)], [1], 1)


def test_one_plan_for_all_layers(plans: Plans) -> None:
    spec = AttentionSpec(4, 2, 64, 64, 0.125)
    batch = RaggedBatch.of([Chunk(1, 9, [0], 0)])
    kernel = FlashInferKernel(lambda: plans.module, "cpu")
    for _ in range(3):
        keys, values = torch.randn(2, 4, 128, 2, 64, dtype=torch.bfloat16)
        kernel(torch.randn(1, 4, 64, dtype=torch.bfloat16), LayerView(keys, values), batch, spec, None)
    assert len(plans.pages) == 1
