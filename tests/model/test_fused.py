"""Norms and gates in one pass over memory, over all layouts and the whole range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from vattention.model.difference import TOLERANCE
from vattention.model.fused import FusedRMSNorm, GatedMLP
from vattention.model.optimize import optimize
from vattention.native import kernels

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")


@needs_kernels
class TestFusedRMSNorm:
    def fused(
        self, width: int, dtype: torch.dtype, offset: float, epsilon: float
    ) -> tuple[FusedRMSNorm, nn.Module]:
        class SomeRMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(width).to(dtype))
                self.variance_epsilon = epsilon

            def forward(self, x: Tensor) -> Tensor:
                scale = self.weight.double() + offset
                return F.rms_norm(x.double(), (width,), scale, epsilon).to(x.dtype)

        norm = SomeRMSNorm()
        model = nn.Sequential(norm)
        assert optimize(model).replaced == {"rms norm": 1}
        assert isinstance(model[0], FusedRMSNorm)
        return model[0], norm

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("width", [1, 15, 16, 640, 1000])
    @pytest.mark.parametrize(("offset", "epsilon"), [(0.0, 1e-5), (1.0, 1e-6)])
    def test_all_layouts(self, width: int, dtype: torch.dtype, offset: float, epsilon: float) -> None:
        fused, norm = self.fused(width, dtype, offset, epsilon)
        x = torch.randn(2, 30, 4, width).to(dtype)
        for view in (
            x,
            x.transpose(1, 2),
            x[:, ::2],
            x[..., : width // 2 + 1].repeat(1, 1, 1, 2)[..., :width],
            x[:0],
        ):
            y = fused(view)
            assert y.shape == view.shape
            if view.numel():
                torch.testing.assert_close(y, norm(view), rtol=TOLERANCE[dtype], atol=1e-6)

    def test_another_type_goes_to_the_original(self) -> None:
        fused, norm = self.fused(8, torch.bfloat16, 0.0, 1e-5)
        x = torch.randn(3, 8)
        assert torch.equal(fused(x), norm(x))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_over_the_whole_range(dtype: torch.dtype) -> None:
    library = kernels()
    assert library is not None
    x = torch.cat((torch.linspace(-120, 120, 997), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, torch.nan]))).to(
        dtype
    )
    ones = torch.ones_like(x)
    out = torch.empty(1, len(x), dtype=dtype)
    for activation, name in ((F.silu, "silu"), (lambda v: F.gelu(v, approximate="tanh"), "gelu_pytorch_tanh")):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=72, num_hidden_layers=1, vocab_size=101, hidden_act=name
        )
        block = AutoModelForCausalLM.from_config(config).model.layers[0].mlp
        gate = GatedMLP.of(block)
        assert gate is not None
        library.rowwise.gate(torch.stack((x, ones)).view(1, -1), gate.gate.linear, gate.gate.cubic, out)
        rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(out[0], activation(x.double()).to(dtype), rtol=rtol, atol=1e-6, equal_nan=True)
