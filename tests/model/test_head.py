"""Output layers: likeliest tokens without logits are those of the logits, what is no plain product is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.architectures import ARCHITECTURES
from vattention.model.head import HiddenStates, Scratch, plain_output_layer
from vattention.model.linear import PackedLinear
from vattention.model.native_linear import NativeLinear
from vattention.model.predictions import GivenLogits, Predictions
from vattention.model.sampler import SampleRow, sample
from vattention.sampling_params import SamplingParams

needs_kernels = pytest.mark.skipif(
    not NativeLinear.available(torch.bfloat16), reason="no compiled kernels on this machine"
)
DTYPES = (torch.float32, torch.bfloat16)


def both(hidden: Tensor, weight: Tensor) -> tuple[Predictions, Tensor]:
    """Predictions from hidden states, and their logits computed once more."""
    layer = NativeLinear.pack(weight, None)
    return HiddenStates(hidden, layer, Scratch()), hidden.float() @ weight.float().T


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 33, 300])
@pytest.mark.parametrize("vocab", [1, 31, 5003])
def test_the_likeliest_are_those_of_the_logits(dtype: torch.dtype, num_rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 64, generator=generator).to(dtype)
    predictions, expected = both(hidden, torch.randn(vocab, 64, generator=generator).to(dtype))
    rows = range(num_rows)
    logits = predictions.logits(rows)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    ids, largest = predictions.likeliest(rows)
    assert np.array_equal(largest, logits.amax(-1).numpy())
    assert np.array_equal(ids, logits.numpy().argmax(-1))


@needs_kernels
@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 32])
def test_samples_are_those_of_the_logits(num_rows: int, screened: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    layer = NativeLinear.pack(torch.randn(5003, 64, generator=generator).bfloat16(), None)
    if screened and not layer.screen():
        pytest.skip("needs a processor with VNNI")
    predictions = HiddenStates(torch.randn(num_rows, 64, generator=generator).bfloat16(), layer, Scratch())
    given = GivenLogits(predictions.logits(range(num_rows)).clone())
    for index in range(20):
        temperatures = [(1.0, 0.0, 8.0, 1e3)[(index + i) % 4] for i in range(num_rows)]
        rows = [
            SampleRow(SamplingParams(temperature=temperature), i, [], [0] * index, frozenset())
            for i, temperature in enumerate(temperatures)
        ]
        assert sample(predictions, range(num_rows), rows) == sample(given, range(num_rows), rows)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_the_first_of_equals_wins_and_nan_is_the_largest(threads: int) -> None:
    weight = torch.zeros(20_000, 32)
    weight[[7, 9_000, 19_999]] = 1.0
    hidden = torch.ones(3, 32)
    hidden[1] = -1.0
    hidden[2, 5] = torch.nan
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids, largest = both(hidden.bfloat16(), weight.bfloat16())[0].likeliest(range(3))
    finally:
        torch.set_num_threads(before)
    assert ids.tolist() == [7, 0, 0]
    assert largest[:2].tolist() == [32.0, 0.0]
    assert np.isnan(largest[2])


@needs_kernels
@pytest.mark.parametrize("threads", [2, 20])
def test_the_first_of_equals_wins_in_whatever_order_threads_come(threads: int) -> None:
    """Those that are done with their own columns help with earlier ones."""
    weight = torch.ones(20_000, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for first in range(0, 10_000, 250):
            weight[:first] = 0.0
            assert both(torch.ones(1, 32), weight)[0].likeliest([0])[0].tolist() == [first]
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_some_rows_alone() -> None:
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    predictions, expected = both(hidden, torch.eye(32))
    assert len(predictions) == 6
    torch.testing.assert_close(predictions.logits([4, 1]), expected[[4, 1]])
    assert predictions.likeliest([5, 0])[0].tolist() == expected[[5, 0]].argmax(-1).tolist()
    assert predictions.likeliest([2] * 6)[0].tolist() == [int(expected[2].argmax())] * 6
    assert predictions.likeliest([0, 2, 1, 3, 4, 5])[0].tolist() == expected[[0, 2, 1, 3, 4, 5]].argmax(-1).tolist()
    assert predictions.logits([]).shape == (0, 32)
    assert len(predictions.likeliest([])[0]) == 0


def test_given_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 1.0, 2.0], [-1.0, -2.0, -torch.inf]])
    predictions = GivenLogits(logits)
    assert predictions.logits(range(3)) is logits
    assert torch.equal(predictions.logits([2, 0]), logits[[2, 0]])
    ids, largest = predictions.likeliest([0, 1, 2])
    assert ids.tolist() == [1, 0, 0]
    assert largest[0] == 3.0
    assert np.isnan(largest[1])


def test_scratch_is_used_again() -> None:
    scratch = Scratch()
    first = scratch.widened(torch.ones(4, 10, dtype=torch.bfloat16))
    assert first.dtype == torch.float32
    assert bool((first == 1).all())
    assert scratch.take(2, 20).data_ptr() == first.data_ptr()
    exact = torch.ones(1, 3)
    assert scratch.widened(exact) is exact


@needs_kernels
@pytest.mark.parametrize(("name", "plain"), [("llama", True), ("gemma3", True), ("gemma2", False)])
def test_logits_that_are_capped_come_from_the_model(name: str, plain: bool) -> None:
    model = ARCHITECTURES[name]()
    assert plain_output_layer(model) is None
    model.set_output_embeddings(PackedLinear.of(model.get_output_embeddings(), NativeLinear))
    assert (plain_output_layer(model) is not None) == plain
