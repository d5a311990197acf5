"""Memory on huge pages: aligned, apart, and given back."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vattention.native.huge import HugeBlocks, huge_empty

HUGE_PAGE_NBYTES = 2 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 63, HUGE_PAGE_NBYTES - 1, HUGE_PAGE_NBYTES, 3 * HUGE_PAGE_NBYTES + 5])
def test_large_tensors_begin_at_a_huge_page(nbytes: int) -> None:
    tensor = huge_empty(nbytes, torch.uint8)
    assert len(tensor) == nbytes
    assert nbytes == 0 or tensor.data_ptr() % (64 if nbytes < HUGE_PAGE_NBYTES else HUGE_PAGE_NBYTES) == 0


def test_small_tensors_lie_in_one_block() -> None:
    blocks = HugeBlocks()
    tensors = [blocks.empty(300_000, torch.bfloat16) for _ in range(5)]
    assert tensors[0].data_ptr() % HUGE_PAGE_NBYTES == 0
    assert {b.data_ptr() - a.data_ptr() for a, b in pairwise(tensors)} == {600_000}


@given(st.lists(st.integers(0, 12 << 20), max_size=12))
def test_tensors_lie_apart_at_cache_lines(sizes: list[int]) -> None:
    blocks = HugeBlocks()
    tensors = [blocks.empty(size, torch.int8) for size in sizes]
    assert [len(tensor) for tensor in tensors] == sizes
    places = sorted((tensor.data_ptr(), len(tensor)) for tensor in tensors if len(tensor))
    assert all(place % 64 == 0 for place, _ in places)
    assert all(place + size <= after for (place, size), (after, _) in pairwise(places))


def test_a_block_lives_as_long_as_its_tensors() -> None:
    blocks = HugeBlocks()
    first, second = blocks.empty(1 << 20, torch.int8), blocks.empty(1 << 20, torch.int8)
    large = blocks.empty(64 << 20, torch.int8)
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    storage = weakref.ref(first.untyped_storage())
    blocks.empty(31 << 20, torch.int8)  # does not fit behind the others
    del first
    gc.collect()
    second.fill_(7)
    assert int(second.sum()) == 7 << 20
    assert storage() is not None
    del second
    gc.collect()
    assert storage() is None
