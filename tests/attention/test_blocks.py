from __future__ import annotations

import pytest
import torch

from vattention.attention.blocks import blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("max_scores", [1, 20, 10_000])
def test_blocks_show_each_row_just_what_it_sees(window: int | None, start: int, max_scores: int) -> None:
    seen = {}
    for block in blocks(3, 11, start, window, max_scores):
        mask = block.visible(CPU)
        assert mask.shape == (block.num_rows, block.num_keys)
        added = block.mask(CPU, torch.float32)
        assert added.eq(0).equal(mask)
        assert added.isneginf().equal(~mask)
        if block.sees_all:
            assert mask.all()
        if block.is_causal_square:
            assert mask.equal(torch.ones_like(mask).tril())
        for i in range(block.num_rows):
            row = block.first_row + i
            assert row not in seen
            seen[row] = [block.first_key + key for key in range(block.num_keys) if mask[i, key]]
    assert sorted(seen) == list(range(3, 14))
    for row, keys in seen.items():
        position = start + row - 3
        assert keys == [key for key in range(position + 1) if window is None or position - key < window]


def test_scores_of_a_block_stay_near_the_bound() -> None:
    for block in blocks(0, 500, 3500, None, 100_000):
        assert block.num_rows * block.num_keys <= 100_000


def test_a_window_bounds_the_work_of_a_long_chunk() -> None:
    total = sum(block.num_rows * block.num_keys for block in blocks(0, 2048, 0, 64, 1 << 22))
    assert total <= 2048 * 1.5 * 64


def test_a_chunk_that_fits_is_one_block() -> None:
    assert len(list(blocks(0, 100, 0, None, 10_000))) == 1
    assert len(list(blocks(0, 100, 0, 100, 1 << 22))) == 1
