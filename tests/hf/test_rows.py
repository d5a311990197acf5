"""Which rows beam search copies, in which order, from which token on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vattention.hf.rows import SPARE, Lineage, moves

parents_lists = st.integers(1, 8).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n))


@given(parents_lists)
def test_moves_give_each_row_its_parent(parents: list[int]) -> None:
    rows = {row: row for row in range(len(parents))}
    for destination, source in moves(parents):
        rows[destination] = rows[source]
    rows.pop(SPARE, None)
    assert list(rows.values()) == parents


@given(parents_lists)
def test_moves_copy_only_rows_that_change_and_one_more_per_circle(parents: list[int]) -> None:
    order = moves(parents)
    written = sorted(destination for destination, _ in order if destination != SPARE)
    assert written == [row for row, parent in enumerate(parents) if row != parent]
    assert sum(destination == SPARE for destination, _ in order) <= len(parents) // 2


def test_moves_needs_no_spare_row_without_a_circle() -> None:
    assert moves([0, 0, 1]) == [(2, 1), (1, 0)]
    assert moves([0, 1, 2]) == []


def test_a_circle_goes_through_the_spare_row() -> None:
    assert SPARE in [destination for destination, _ in moves([1, 0])]


@given(st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 3), min_size=4, max_size=4)), max_size=8))
def test_shared_tokens_are_really_shared(steps: list[tuple[int, list[int]]]) -> None:
    lineage = Lineage(4)
    rows = [np.empty(0, dtype=np.int64) for _ in range(4)]
    fresh = iter(range(10_000))
    for num_new, parents in steps:
        rows = [np.append(row, [next(fresh) for _ in range(num_new)]) for row in rows]
        rows = [rows[parent].copy() for parent in parents]
        lineage.take(parents, len(rows[0]))
        for i, row in enumerate(rows):
            for j, other in enumerate(rows):
                # Every token was unique when it was appended, so what rows share is exactly what was copied.
                assert lineage.shared(i, j) == int(np.cumprod(row == other).sum())


def test_a_crop_shortens_what_is_shared() -> None:
    lineage = Lineage(2)
    lineage.take([0, 0], 10)
    lineage.crop(6)
    assert lineage.shared(0, 1) == 6
