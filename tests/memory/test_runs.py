"""Contiguous runs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vattention.memory.runs import runs


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([8], [(0, 1)]),
        ([0, 4, 8], [(0, 3)]),
        ([0, 4, 12, 16, 24], [(0, 2), (2, 2), (4, 1)]),
    ],
)
def test_runs(values: list[int], expected: list[tuple[int, int]]) -> None:
    assert list(runs(np.array(values, np.int64), 4)) == expected


def test_a_change_of_the_constant_ends_a_run() -> None:
    values = np.arange(6, dtype=np.int64)
    assert list(runs(values, 1, np.array([0, 0, 5, 5, 5, 0]))) == [(0, 2), (2, 3), (5, 1)]


@given(st.sets(st.integers(0, 60)))
def test_runs_are_maximal_and_cover_everything(chosen: set[int]) -> None:
    values = np.array(sorted(chosen), np.int64)
    found = [values[start : start + count].tolist() for start, count in runs(values, 1)]
    assert [x for run in found for x in run] == sorted(chosen)
    assert all(run == list(range(run[0], run[0] + len(run))) for run in found)
    assert all(right[0] > left[-1] + 1 for left, right in pairwise(found))
