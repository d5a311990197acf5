"""What tests of linear layers share: shapes, bounds on errors, weights whose largest products are hard to find."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vattention.model.gumbel import noise_for
from vattention.model.linear import LinearMethod
from vattention.model.native_linear import NativeLinear
from vattention.native import Noise

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (32, 16), (33, 17), (100, 77), (65, 300), (65, 320), (640, 1030), (320, 1024))
"""[out, in]: whole panels, strips and tiles of the compiled kernel, and all kinds of rests."""


def tolerance(x: Tensor, weight: Tensor) -> float:
    """One unit in the last place of the largest result, and float32's rounding on the way."""
    scale = float((x.double().abs() @ weight.double().abs().T).max())
    largest = float((x.double() @ weight.double().T).abs().max())
    return (2**-7 * largest if x.dtype == torch.bfloat16 else 0.0) + 1e-6 * scale


def check_products(method: type[LinearMethod], dtype: torch.dtype, rows: int) -> None:
    """Of weights of all `SHAPES`, with and without a bias."""
    for num_out, num_in in SHAPES:
        weight, bias = torch.randn(num_out, num_in).to(dtype), torch.randn(num_out).to(dtype)
        x = torch.randn(rows, num_in).to(dtype)
        for given in (None, bias):
            y = method.pack(weight, given)(x)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            assert y.dtype == dtype
            assert y.shape == exact.shape
            if rows:
                bound = tolerance(x, weight) + (2**-7 * 5 if dtype == torch.bfloat16 else 0)
                assert float((y.double() - exact).abs().max()) <= bound, (num_out, num_in, given is None)


def noises(num_rows: int) -> Iterator[Noise | None]:
    """None, and noise at one temperature or at another one for each row."""
    yield None
    for temperatures in ((0.02,), (1.0,), (30.0,), (1e9,), (0.0, 1.0, 1e-3, 1e5)):
        yield noise_for([(3, i, temperatures[i % len(temperatures)]) for i in range(num_rows)])


def some_weights() -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and inputs that are hard to screen, for some reason each."""
    for num_out, num_in in ((1, 1), (31, 64), (33, 65), (5000, 100), (3000, 640)):
        yield torch.randn(num_out, num_in), torch.randn(5, num_in)
    outliers = torch.randn(4000, 128)
    outliers[:, 7] *= 100.0
    yield outliers, torch.randn(21, 128) * torch.logspace(-3, 3, 128)
    close = torch.randn(1, 96).expand(3000, -1) + torch.randn(3000, 96) * 1e-3
    yield close, torch.randn(40, 96)
    tiny = torch.zeros(32 * 40, 64)
    tiny[:, 3] = torch.logspace(-45, -10, len(tiny))
    tiny[17] = torch.randn(64)
    yield tiny, torch.cat([tiny[17:18], -tiny[17:18], torch.randn(2, 64) * 1e-20, torch.randn(1, 64) * 1e30])
    few = torch.zeros(2000, 64)
    few[[5, 1700, 1999], 3] = 1.0
    yield few, torch.cat([torch.eye(64)[:9], -torch.eye(64)[:9], torch.zeros(1, 64)])


def same_largest(weight: Tensor, x: Tensor) -> None:
    """The screened result is that of computing everything, to the bit."""
    plain, screened = NativeLinear.pack(weight, None), NativeLinear.pack(weight, None)
    assert screened.screen()
    for noise in noises(len(x)):
        assert screened._screen is not None
        screened._screen._num_rests = 0
        for own, expected in zip(screened.largest(x, noise), plain.largest(x, noise), strict=True):
            np.testing.assert_array_equal(own, expected)
