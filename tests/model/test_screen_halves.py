"""The largest of an output layer in halves, found in the upper ones, against computing everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.linears import noises, some_weights
from vattention import native
from vattention.model.quantize import HalvedInt8
from vattention.model.quantized import HalvedInt8Linear, Int4Linear, Int8Linear
from vattention.native.products import Products

pytestmark = pytest.mark.skipif(
    not HalvedInt8Linear.available(torch.bfloat16), reason="needs a processor with VNNI"
)

EXACT, MISLEADING = 5 * 32 + 7, 40 * 32 + 3
"""Rows of `hard_weight`."""


@pytest.fixture
def useful(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each use of a screen spared work."""
    uses: list[bool] = []
    screened = Products.screened_largest

    def noted(self: Products, *arguments: object) -> tuple[native.Largest, bool]:
        result = screened(self, *arguments)  # type: ignore[arg-type]
        uses.append(result[1])
        return result

    monkeypatch.setattr(Products, "screened_largest", noted)
    return uses


def screened(weight: Tensor) -> HalvedInt8Linear:
    """A layer that is screened for any number of rows."""
    layer = HalvedInt8Linear.pack(weight, None)
    assert layer.screen()
    assert layer._screen is not None
    layer._screen.most_rows = math.inf
    return layer


def same_largest(weight: Tensor, x: Tensor) -> None:
    """Results are those of both layers that compute everything, to the bit."""
    layer = screened(weight)
    for noise in noises(len(x)):
        assert layer._screen is not None
        layer._screen._num_rests = 0
        own = layer.largest(x, noise)
        for method in (HalvedInt8Linear, Int8Linear):
            for found, expected in zip(own, method.pack(weight, None).largest(x, noise), strict=True):
                np.testing.assert_array_equal(found, expected)


def hard_weight(lower: float) -> Tensor:
    """Rows whose numbers in the group of `ones` are wholly known to the last bit, but not by their upper halves.

    EXACT has them at `lower` above a multiple of 16, MISLEADING nearly all at such a multiple; others are zero.
    """
    weight = torch.zeros(64 * 32, 64)
    weight[EXACT, 0], weight[EXACT, 1:32] = 127.0, lower
    weight[MISLEADING, 0], weight[MISLEADING, 1:31], weight[MISLEADING, 31] = 119.0, 15.0, 9.375
    return weight.bfloat16()


def ones(rows: int) -> Tensor:
    """Powers of two, which lengths grow with and order does not."""
    x = torch.zeros(rows, 64)
    x[:, 1:32] = 2.0 ** torch.arange(rows).remainder(5)[:, None]
    return x.bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 32])
def test_the_bound_is_one_where_all_errors_have_one_sign(rows: int, useful: list[bool]) -> None:
    """All lower halves of EXACT are at their most: it is larger than upper halves say by all of the bound."""
    columns, values = screened(hard_weight(15.0)).largest(ones(rows))
    assert columns.tolist() == [EXACT] * rows
    assert values.tolist() == (15.0 * ones(rows).float().sum(1)).tolist()
    assert useful == [True]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_lower_halves_are_read_of_candidates_alone(rows: int) -> None:
    """With other lower halves than those that the screen was made from, EXACT is the largest and no candidate."""
    layer = screened(hard_weight(8.0))
    _, _, lower = HalvedInt8.places(layer._panels)
    lower[EXACT // 32].fill_(255)
    x = ones(rows)
    assert HalvedInt8Linear.largest(layer, x)[0].tolist() == [MISLEADING] * rows
    layer._screen = None
    assert layer.largest(x)[0].tolist() == [EXACT] * rows


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 33])
def test_the_largest_are_the_same(rows: int) -> None:
    for weight, x in some_weights():
        same_largest(weight.bfloat16(), x[:rows].bfloat16())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 200),
    st.integers(1, 34),
    st.sampled_from([1.0, 1e-12, 1e12]),
    st.integers(0, 1 << 30),
)
def test_any_shape(num_out: int, num_in: int, rows: int, size: float, seed: int) -> None:
    """Few different rows, so that there are ties, some of them as input; groups of very different size."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 2, num_in)[torch.randperm(num_in, generator=generator)]
    different = torch.randn(max(1, num_out // 3), num_in, generator=generator) * spread
    weight = different[torch.randint(len(different), (num_out,), generator=generator)]
    x = torch.randn(rows, num_in, generator=generator) * size
    x[::2] = weight[torch.randint(num_out, (len(x[::2]),), generator=generator)] * size
    same_largest(weight.bfloat16(), x.bfloat16())


def test_nan_and_infinity_are_seen() -> None:
    weight, x = torch.randn(3000, 64).bfloat16(), torch.randn(6, 64).bfloat16()
    x[2, 5], x[4, 1] = torch.nan, torch.inf
    same_largest(weight, x)
    weight[2000, 3] = torch.inf
    assert not HalvedInt8Linear.pack(weight, None).screen()


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_the_weight_are_found_without_most_of_it(rows: int, useful: list[bool]) -> None:
    weight = torch.randn(32 * 300, 640).bfloat16()
    layer = screened(weight)
    chosen = torch.randint(len(weight), (rows,))
    assert layer.largest(weight[chosen])[0].tolist() == chosen.tolist()
    assert useful == [True]


def test_many_rows_are_all_computed(useful: list[bool]) -> None:
    layer = HalvedInt8Linear.pack(hard_weight(15.0), None)
    assert layer.screen()
    for rows in (1, 16, 2):
        layer.largest(ones(rows))
    assert useful == [True, True]


def test_rests_become_longer_until_it_is_of_use() -> None:
    layer = screened(torch.ones(32 * 50, 64).bfloat16())
    screen = layer._screen
    assert screen is not None
    rests = []
    for useful in (False, False, False, False, False, True, False):
        screen.note(useful)
        rests.append(0)
        while screen.take_rest():
            rests[-1] += 1
    assert rests == [1, 2, 4, 8, 8, 0, 1]


def test_only_of_halves_and_without_a_bias() -> None:
    weight = torch.randn(64, 64).bfloat16()
    assert not Int8Linear.pack(weight, None).screen()
    assert not Int4Linear.pack(weight, None).screen()
    assert not HalvedInt8Linear.pack(weight, torch.zeros(64).bfloat16()).screen()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_bound_is_one_where_a_number_of_x_is_set_apart(rows: int, useful: list[bool]) -> None:
    x = ones(rows)
    x[:, 7] *= 64
    columns, values = screened(hard_weight(15.0)).largest(x)
    assert columns.tolist() == [EXACT] * rows
    assert values.tolist() == (15.0 * x.float().sum(1)).tolist()
    assert useful == [True]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_bound_is_one_where_all_of_x_is_rounded_down(rows: int, useful: list[bool]) -> None:
    """Upper halves say nearly all of these weights, and say the same of both."""
    first, second = sorted((EXACT, MISLEADING))
    weight = torch.zeros(64 * 32, 64)
    weight[[first, second], 0], weight[[first, second], 1:32] = 127.0, 119.0
    weight[first, 31] = 117.0
    x = torch.zeros(rows, 64)
    x[:, 1:31], x[:, 31] = 0.5, 127.0
    columns, _ = screened(weight.bfloat16()).largest(x.bfloat16())
    assert columns.tolist() == [second] * rows
    assert useful == [True]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_bound_is_one_for_lower_halves_at_their_least(rows: int, useful: list[bool]) -> None:
    """Products with negative numbers are larger than upper halves say by all of the bound."""
    weight = torch.zeros(64 * 32, 64)
    weight[EXACT, 0], weight[EXACT, 1:32] = 127.0, -16.0
    weight[MISLEADING, 0], weight[MISLEADING, 1:31], weight[MISLEADING, 31] = 119.0, -15.9375, -15.0
    columns, values = screened(weight.bfloat16()).largest(-ones(rows))
    assert columns.tolist() == [EXACT] * rows
    assert values.tolist() == (16.0 * ones(rows).float().sum(1)).tolist()
    assert useful == [True]
