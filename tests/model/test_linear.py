"""Every way to compute a linear layer, forced, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.model.linears import DTYPES, SHAPES, check_products, tolerance
from vattention.model.linear import LinearMethod, PackedLinear
from vattention.model.linear_methods import METHODS
from vattention.model.torch_linear import WideningLinear

CASES = [
    pytest.param(method, dtype, id=f"{method.name}-{str(dtype).removeprefix('torch.')}")
    for method in METHODS
    for dtype in DTYPES
    if method.available(dtype)
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 12, 13, 37, 200])
def test_agrees_with_float64(method: type[LinearMethod], dtype: torch.dtype, rows: int) -> None:
    check_products(method, dtype, rows)


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_gives_the_weight_back(method: type[LinearMethod], dtype: torch.dtype) -> None:
    for num_out, num_in in SHAPES:
        weight = torch.randn(num_out, num_in).to(dtype)
        assert torch.equal(method.pack(weight, None).weight(), weight)


@pytest.mark.parametrize("method", [method for method in METHODS if method.available(torch.bfloat16)])
def test_takes_a_weight_that_begins_anywhere(method: type[LinearMethod]) -> None:
    weight = torch.randn(1 + 70 * 60).bfloat16()[1:].view(70, 60)
    assert torch.equal(method.pack(weight, None).weight(), weight)


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_takes_any_strides(method: type[LinearMethod], dtype: torch.dtype) -> None:
    weight = torch.randn(70, 60).T[:, ::2].to(dtype)
    packed = method.pack(weight, None)
    wide = torch.randn(9, 70).to(dtype)
    for x in (wide[:, ::2], wide[::2, 3:38], torch.randn(35, 9).to(dtype).T, wide[:1, :35].expand(4, 35)):
        error = (packed(x).double() - x.double() @ weight.double().T).abs().max()
        assert float(error) <= tolerance(x, weight)


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_any_number_of_threads_gives_the_same(method: type[LinearMethod], dtype: torch.dtype, threads: int) -> None:
    weight, x = torch.randn(333, 400).to(dtype), torch.randn(101, 400).to(dtype)
    packed = method.pack(weight, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        error = (packed(x).double() - x.double() @ weight.double().T).abs().max()
    finally:
        torch.set_num_threads(before)
    assert float(error) <= tolerance(x, weight)


def test_widening_splits_wide_weights() -> None:
    class SmallBlocks(WideningLinear):
        block_nbytes = 4 * 50 * 7

    weight, x = torch.randn(100, 50).bfloat16(), torch.randn(40, 50).bfloat16()
    exact = x.double() @ weight.double().T
    assert float((SmallBlocks.pack(weight, None)(x).double() - exact).abs().max()) <= tolerance(x, weight)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 0, 24)])
def test_module_takes_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(24, 40)
    for method in METHODS:
        if method.available(torch.float32):
            packed = PackedLinear.of(linear, method)
            with torch.no_grad():
                torch.testing.assert_close(packed(torch.ones(shape)), linear(torch.ones(shape)))
            assert torch.equal(packed.weight, linear.weight)
