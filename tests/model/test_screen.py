"""The largest of an output layer's outputs, found by a copy in 8 bits, against computing everything."""

from __future__ import annotations

import pytest
import torch

from tests.model.linears import same_largest, some_weights
from vattention import native
from vattention.model.gumbel import noise_for
from vattention.model.native_linear import NativeLinear


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.skipif(
    (library := native.kernels()) is None or not library.products.can_screen, reason="needs a processor with VNNI"
)
class TestScreen:
    def test_the_largest_are_the_same(self) -> None:
        for weight, x in some_weights():
            same_largest(weight.bfloat16(), x.bfloat16())

    def test_nan_and_infinity_are_seen(self) -> None:
        weight, x = torch.randn(3000, 64).bfloat16(), torch.randn(6, 64).bfloat16()
        x[2, 5], x[4, 1] = torch.nan, torch.inf
        same_largest(weight, x)
        weight[2000, 3] = torch.nan
        assert not NativeLinear.pack(weight, None).screen()
        weight[2000, 3] = torch.inf
        assert not NativeLinear.pack(weight, None).screen()

    def test_it_computes_few_panels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An input that is one of the weight's rows: memory that no other row needs may hold anything."""
        weight = torch.randn(32 * 100, 256).bfloat16()
        screened = NativeLinear.pack(weight, None)
        assert screened.screen()
        screened._panels.view(100, -1)[:50] = torch.nan
        assert screened.largest(weight[3000:3001])[0].tolist() == [3000]

    @pytest.mark.parametrize("temperature", [1.0, 1e6])
    def test_it_computes_few_panels_of_a_sample(self, temperature: float) -> None:
        """Where noise decides, and where the product does: only panels near the winner's may be looked at."""
        weight, x = torch.randn(32 * 100, 256).bfloat16(), torch.zeros(2, 256).bfloat16()
        x[:] = weight[3000] if temperature == 1.0 else weight[3000] * 1e-3
        screened = NativeLinear.pack(weight, None)
        assert screened.screen()
        noise = noise_for([(1, 2, temperature), (1, 3, temperature)])
        columns, _ = screened.largest(x, noise)
        panels = screened._panels.view(100, -1)
        for panel in set(range(100)) - {column // 32 for column in columns.tolist()}:
            panels[panel] = torch.nan
        assert screened.largest(x, noise)[0].tolist() == columns.tolist()

    def test_only_plain_bfloat16(self) -> None:
        assert not NativeLinear.pack(torch.randn(64, 64), None).screen()
        assert not NativeLinear.pack(torch.randn(64, 64).bfloat16(), torch.zeros(64).bfloat16()).screen()

    def test_its_memory_is_known(self) -> None:
        layer = NativeLinear.pack(torch.randn(5000, 100).bfloat16(), None)
        assert layer.screen_nbytes == 0
        assert layer.screen()
        # A byte for each number, padded to panels of 32 columns and 64 steps; three of four bytes for each column.
        assert layer.screen_nbytes == 5024 * (128 + 3 * 4)
