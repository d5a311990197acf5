"""Compiled embeddings against the modules they stand for, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from vattention.model.embedding import CompiledEmbedding, ModuleEmbedding
from vattention.model.quantized import (
    HalvedInt8Linear,
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedMethod,
    UnpackingInt8,
)
from vattention.native import int64s, kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")

NUM = 300
METHODS: list[type[QuantizedMethod]] = [Int8Linear, HalvedInt8Linear, Int4Linear]


class Shifted(nn.Embedding):
    """More than a factor."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1.0


class Scaled(nn.Embedding):
    """By a number that no row of bfloat16 shows."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 25.3


def compiled(module: nn.Module) -> Callable[..., Tensor]:
    library = kernels()
    assert library is not None
    found = CompiledEmbedding.of(library, module)
    assert found is not None
    return lambda *ids: found(int64s(ids))


def embedding(width: int, dtype: torch.dtype, scale: float | None = None, num: int = NUM) -> nn.Embedding:
    torch.manual_seed(width)
    made: nn.Embedding
    if scale is None:
        made = nn.Embedding(num, width, 0)
    else:
        made = Gemma3TextScaledWordEmbedding(num, width, 0, embed_scale=scale)
    with torch.no_grad():
        made.weight.normal_()
        made.weight[1, :3] = torch.tensor([-0.0, 1e-39, 65504.0])[:width]
    return made.to(dtype).requires_grad_(False)


def assert_same(module: nn.Module, num: int = NUM) -> None:
    given = compiled(module)
    every = list(range(num))
    for ids in ([3], [num - 1, 0, 0, 7], every, every[::-1] * 2):
        assert torch.equal(given(*ids), module(torch.tensor(ids)))


@pytest.mark.parametrize("scale", [None, 25.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 32, 77, 640])
def test_rows_of_a_table(width: int, dtype: torch.dtype, scale: float | None) -> None:
    assert_same(embedding(width, dtype, scale))


@pytest.mark.parametrize("scale", [None, 25.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_quantized_output_layer(
    method: type[QuantizedMethod], dtype: torch.dtype, scale: float | None
) -> None:
    if not method.available(dtype):
        pytest.skip("not on this processor")
    for num, width in ((NUM, 3), (NUM, 77), (NUM + 1, 320)):
        table = embedding(width, dtype, scale, num)
        # Groups of different size: a scale in the wrong place shows.
        table.weight.mul_(torch.logspace(-2, 2, width).to(dtype))
        assert_same(QuantizedEmbedding(table, method.pack(table.weight, None)), num)


def test_tokens_that_are_none_are_refused() -> None:
    given = compiled(embedding(8, torch.float32))
    for wrong in (-1, NUM, 2**40):
        with pytest.raises(IndexError, match=f"{NUM}"):
            given(3, wrong)


def test_modules_that_do_more_compute_themselves() -> None:
    library = kernels()
    assert library is not None
    heard = embedding(8, torch.float32)
    heard.register_forward_hook(lambda *_: None)
    weight = embedding(8, torch.float32).weight
    unpacking = QuantizedEmbedding(embedding(8, torch.float32), UnpackingInt8.pack(weight, None))
    others = (
        Shifted(NUM, 8),
        Scaled(NUM, 8).bfloat16(),
        nn.Embedding(NUM, 8, max_norm=1.0),
        embedding(8, torch.float16),
        nn.Embedding(NUM, 8, _weight=torch.randn(8, NUM).T),
        nn.Linear(8, 8),
        unpacking,
        heard,
    )
    for module in others:
        assert CompiledEmbedding.of(library, module) is None, module


def test_a_models_own_module() -> None:
    class Model:
        def get_input_embeddings(self) -> nn.Module:
            return embedding(8, torch.float32)

    own = ModuleEmbedding(Model())
    assert torch.equal(own(int64s([3, 1])), Model().get_input_embeddings()(torch.tensor([3, 1])))
