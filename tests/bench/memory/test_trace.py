from __future__ import annotations

import numpy as np
import pytest

from vattention.bench.memory.trace import ALPACA, SHAREGPT, Dataset, Lengths, draw_trace


@pytest.mark.parametrize(
    ("dataset", "prompt", "output"), [(SHAREGPT, 161, 338), (ALPACA, 19, 58)], ids=lambda value: str(value)[:20]
)
@pytest.mark.parametrize("count", [50, 5000])
def test_means_are_the_data_sets(dataset: Dataset, prompt: float, output: float, count: int) -> None:
    trace = draw_trace(dataset, count=count, requests_per_s=2, seed=1)
    assert trace.prompts.mean() == pytest.approx(prompt, rel=0.02)
    assert trace.outputs.mean() == pytest.approx(output, rel=0.02)
    assert trace.prompts.min() >= 1
    assert (trace.prompts + trace.outputs).max() <= 2048


def test_a_few_lengths_spread_as_many_do() -> None:
    lengths = Lengths(300, 1.0, 4000)
    few, many = (lengths.draw(np.random.default_rng(seed), count) for seed, count in ((1, 40), (2, 20_000)))
    shares = np.arange(0.1, 1, 0.2)
    assert np.quantile(few, shares) == pytest.approx(np.quantile(many, shares), rel=0.25)


def test_lengths_have_a_long_tail() -> None:
    lengths = Lengths(300, 1.0, 4000).draw(np.random.default_rng(0), 20_000)
    assert np.median(lengths) == pytest.approx(300 * np.exp(-0.5), rel=0.05)  # a lognormal's
    assert lengths.max() > 3000


def test_arrivals_are_poisson() -> None:
    gaps = np.diff(draw_trace(ALPACA, count=20_000, requests_per_s=4, seed=0).arrivals_s)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)


def test_a_seed_draws_the_same_anywhere() -> None:
    one, same, other = (draw_trace(SHAREGPT, count=5, requests_per_s=1, seed=seed) for seed in (3, 3, 4))
    assert one.prompts.tolist() == same.prompts.tolist()
    assert one.arrivals_s.tolist() == same.arrivals_s.tolist()
    assert one.arrivals_s.tolist() != other.arrivals_s.tolist()
    assert (one.prompts.tolist(), one.outputs.tolist()) == ([42, 56, 388, 122, 197], [720, 100, 490, 251, 129])
