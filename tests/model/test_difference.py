"""Differences between results that count, and their size."""

from __future__ import annotations

import pytest
import torch

from vattention.model.difference import largest_difference, row_difference


def test_nan_counts_as_a_difference() -> None:
    assert largest_difference(lambda x: x * torch.nan, lambda x: x, torch.empty(4)) == float("inf")


def test_each_row_is_measured_by_its_largest_number() -> None:
    expected = torch.tensor([[1.0, -100.0], [0.5, 0.25]])
    assert row_difference(expected, expected) == 0.0
    assert row_difference(expected + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), expected) == pytest.approx(0.01)
    assert row_difference(expected + torch.tensor([[0.0, 0.0], [0.0, 0.1]]), expected) == pytest.approx(0.2)
