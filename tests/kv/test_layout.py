"""The layout's arithmetic against the definition, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vattention.core import AttentionSpec
from vattention.errors import ConfigError
from vattention.kv.layout import Group, Layout, plan

PAGE = 256


def spec(heads: int, key_dim: int, value_dim: int, window: int | None) -> AttentionSpec:
    return AttentionSpec(heads * 2, heads, key_dim, value_dim, 1.0, window)


specs = st.lists(
    st.builds(
        spec,
        st.integers(1, 3),
        st.sampled_from([4, 8, 12, 16]),
        st.sampled_from([4, 8, 16]),
        st.sampled_from([None, 5, 16]),
    ),
    min_size=1,
    max_size=5,
)
layouts = st.builds(
    lambda layers, slots, length, sliced: plan(
        layers, item_nbytes=2, num_slots=slots, max_len=length, page_nbytes=PAGE, sliced=sliced
    ),
    specs,
    st.integers(1, 4),
    st.integers(1, 100),
    st.booleans(),
)


def bytes_of(group: Group, slot: int, first: int, last: int) -> set[int]:
    """Every byte of the tokens, by the definition of a plane."""
    return {
        byte
        for plane in group.planes
        for byte in range(
            plane.offset_nbytes + slot * plane.row_nbytes + first * plane.token_nbytes,
            plane.offset_nbytes + slot * plane.row_nbytes + last * plane.token_nbytes,
        )
    }


@given(layouts, st.data())
def test_pages_are_those_that_hold_the_tokens(layout: Layout, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from(layout.groups))
    slot = data.draw(st.integers(0, layout.num_slots - 1))
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, layout.max_len)] * 2)))
    pages = group.pages(slot, first, last)
    assert sorted(pages.tolist()) == pages.tolist()
    assert set(pages.tolist()) == {byte // PAGE for byte in bytes_of(group, slot, first, last)}
    assert group.num_pages(first, last) == len(pages)


@given(layouts, st.data())
def test_pages_behind_and_beyond_hold_no_other_token(layout: Layout, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from(layout.groups))
    slot = data.draw(st.integers(0, layout.num_slots - 1))
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, layout.max_len)] * 2)))
    kept = {byte // PAGE for byte in bytes_of(group, slot, last, layout.max_len)}
    behind = set(group.pages_behind(slot, first, last).tolist())
    assert behind == set(group.pages(slot, first, last).tolist()) - kept
    kept = {byte // PAGE for byte in bytes_of(group, slot, 0, first)}
    beyond = set(group.pages_beyond(slot, first, last).tolist())
    assert beyond == set(group.pages(slot, first, last).tolist()) - kept


@given(layouts)
def test_no_two_tensors_share_a_byte_and_all_lie_inside(layout: Layout) -> None:
    seen = np.zeros(layout.nbytes, np.int8)
    for place in (*layout.keys, *layout.values):
        index = np.indices(place.shape).reshape(4, -1)
        starts = place.offset_nbytes + (index * np.array(place.strides_nbytes)[:, None]).sum(0)
        for byte in range(place.strides_nbytes[3]):
            np.add.at(seen, starts + byte, 1)
    assert seen.max() == 1
    assert seen.sum() == layout.num_slots * layout.max_len * layout.token_nbytes


@given(layouts)
def test_rows_are_whole_pages_and_whole_tokens(layout: Layout) -> None:
    for group in layout.groups:
        for plane in group.planes:
            assert plane.row_nbytes % PAGE == 0
            assert plane.offset_nbytes % PAGE == 0
            assert plane.row_nbytes == layout.max_len * plane.token_nbytes


def test_sliced_needs_one_run_where_per_layer_needs_one_per_tensor() -> None:
    layers = [spec(1, 16, 16, None)] * 4
    sliced, apart = (
        plan(layers, item_nbytes=2, num_slots=2, max_len=64, page_nbytes=PAGE, sliced=s) for s in (True, False)
    )
    assert len(sliced.groups[0].planes) == 1
    assert len(apart.groups[0].planes) == 8
    assert sliced.token_nbytes == apart.token_nbytes == 4 * 2 * 16 * 2


def test_group_needs_its_window_only() -> None:
    layout = plan(
        [spec(1, 16, 16, 8), spec(1, 16, 16, None)],
        item_nbytes=2,
        num_slots=1,
        max_len=64,
        page_nbytes=PAGE,
        sliced=False,
    )
    windowed, full = layout.groups
    assert (windowed.first_needed(3), windowed.first_needed(20)) == (0, 13)
    assert full.first_needed(20) == 0


def test_more_tokens_than_int32_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        plan([spec(1, 16, 16, None)], item_nbytes=2, num_slots=2**16, max_len=2**15, page_nbytes=PAGE, sliced=False)
