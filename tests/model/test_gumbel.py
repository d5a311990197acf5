"""Gumbel noise: compiled, by tensor operations and in float64; what wins with it is a sample of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattention.model import gumbel
from vattention.model.gumbel import likeliest, noise_for
from vattention.native import Kernels, Noise, kernels
from vattention.native.products import Products

TEMPERATURES = (1.0, 0.0, 1e-5, 0.05, 0.7, 3.0, 1e3, 1e8, 1e38)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def noise_of(num_rows: int, temperatures: tuple[float, ...] = TEMPERATURES) -> Noise:
    noise = noise_for([(11, i, temperatures[i % len(temperatures)]) for i in range(num_rows)])
    assert noise is not None
    return noise


def without_kernels(logits: Tensor, noise: Noise) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All noise, whether it can matter or not, by tensor operations."""
    low, high = torch.from_numpy(noise["key"].copy().view(np.int32).reshape(-1, 2)).unbind(1)
    ids = torch.arange(logits.shape[1], dtype=torch.int32)
    own = gumbel._gumbel(low[:, None], high[:, None], ids) * torch.from_numpy(noise["temperature"].copy())[:, None]
    noisy = (logits + own).numpy()
    columns = noisy.argmax(-1)
    return columns, noisy[np.arange(len(noisy)), columns]


def hashed(key: int, ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hash once more, in 64 bits."""
    x = ids ^ np.uint64(key & 0xFFFFFFFF)
    for part in (key >> 32, 0):
        x ^= x >> np.uint64(16)
        x = x * np.uint64(0x85EBCA6B) & np.uint64(0xFFFFFFFF)
        x ^= x >> np.uint64(13)
        x = x * np.uint64(0xC2B2AE35) & np.uint64(0xFFFFFFFF)
        x ^= (x >> np.uint64(16)) ^ np.uint64(part)
    return x


def exact_gumbel(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """-ln(-ln u) in float64, for u = 1 - (hash + 1/2) / 2^32."""
    below, above = hashes.astype(np.float64) + 0.5, 2.0**32 - hashes.astype(np.float64) - 0.5
    near_one, elsewhere = -np.log1p(-below / 2.0**32), -np.log(above / 2.0**32)
    return np.asarray(-np.log(np.where(hashes < 2**31, near_one, elsewhere)))


def test_noise_is_near_its_exact_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the hashes, around every power of two, and for any of them."""
    powers = [2**k + i for k in range(33) for i in range(-3, 4)]
    some = np.random.default_rng(0).integers(0, 2**32, 200_000)
    hashes = np.unique(np.clip(np.concatenate([powers, np.arange(3000), some]), 0, 2**32 - 1)).astype(np.uint64)
    monkeypatch.setattr(gumbel, "_mixed", lambda x: x)
    words = torch.from_numpy(hashes.astype(np.uint32).view(np.int32))
    own = gumbel._gumbel(torch.tensor(0), torch.tensor(0), words).double().numpy()
    exact = exact_gumbel(hashes)
    assert np.abs(own - exact).max() < 2.5e-6
    assert np.abs(own - exact)[np.abs(exact) < 8].max() < 7e-7
    assert own.max() - own.min() < gumbel._SPREAD
    monkeypatch.undo()
    ids = torch.arange(100_000, dtype=torch.int32)
    key = noise_of(1)["key"][0]
    low, high = torch.from_numpy(np.array([key]).view(np.int32))
    expected = exact_gumbel(hashed(int(key), np.arange(100_000, dtype=np.uint64)))
    np.testing.assert_allclose(gumbel._gumbel(low, high, ids).numpy(), expected, atol=2.5e-6)


def logits_of(num_rows: int, vocab: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(num_rows, vocab, generator=generator) * spread
    return torch.where(torch.rand(num_rows, vocab, generator=generator) < 0.1, -torch.inf, logits)


CASES = [(1, 1.0), (31, 0.0), (32, 1.0), (33, 5.0), (5003, 0.0), (5003, 1e-4), (5003, 3.0), (40_000, 20.0)]


@pytest.fixture(params=[None, 4, 8, 16])
def products(request: pytest.FixtureRequest, kernels_of_lanes: Callable[..., Path]) -> Products:
    """The installed kernels, and those for narrower vectors."""
    installed = kernels()
    if installed is None:
        pytest.skip("no compiled kernels on this machine")
    return (installed if request.param is None else Kernels(kernels_of_lanes(request.param))).products


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_noise_is_the_same_to_the_bit(
    products: Products, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for vocab, spread in CASES:
        logits, noise = logits_of(18, vocab, spread), noise_of(18)
        for own, expected in zip(products.largest_of(logits, noise), without_kernels(logits, noise), strict=True):
            np.testing.assert_array_equal(own, expected)
        greedy = products.largest_of(logits)
        np.testing.assert_array_equal(greedy[0], logits.numpy().argmax(-1))


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("level", [-50.0, 0.0, 7.0])
def test_the_least_lead_is_seen(products: Products, temperature: float, level: float) -> None:
    """Hashes that tell which noise need not be computed: of two numbers the second one wins by a last bit."""
    draws, late = 20_000, 45
    noise = noise_of(draws, (temperature,))
    logits = torch.full((draws, late + 1), -torch.inf)
    logits[:, 0] = level
    _, first = without_kernels(logits, noise)
    logits[:, 0], logits[:, late] = -torch.inf, 0.0
    _, own = without_kernels(logits, noise)
    second = first - own
    while (behind := second + own <= first).any():
        second[behind] = np.nextafter(second[behind], np.float32(np.inf))
    logits[:, 0], logits[:, late] = level, torch.from_numpy(second)
    assert (products.largest_of(logits, noise)[0] == late).all()
    less = np.nextafter(first, np.float32(-np.inf)) - own
    logits[:, late] = torch.from_numpy(less)
    assert ((products.largest_of(logits, noise)[0] == late) == (less + own > first)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_noise_that_cannot_matter_is_left_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gumbel, "kernels", lambda: None)
    for vocab, spread in CASES:
        logits, noise = logits_of(18, vocab, spread), noise_of(18)
        before = logits.clone()
        for own, expected in zip(likeliest(logits.to(device), noise), without_kernels(logits, noise), strict=True):
            np.testing.assert_array_equal(own, expected)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_not_a_number_and_infinity_are_found(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(gumbel, "kernels", lambda: None)
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    logits[0, 700], logits[1, 999], logits[2], logits[3, 5] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[0, 3] = torch.inf
    columns, values = likeliest(logits, noise_of(5, (1.0, 0.5)))
    assert columns[1] == 999
    assert np.isnan(values[0])
    assert values[1:3].tolist() == [math.inf, -math.inf]
    assert np.isfinite(values[3:]).all()
    sliced = likeliest(logits.T.contiguous().T[3:], noise_of(5, (1.0, 0.5))[3:])
    np.testing.assert_array_equal(sliced, (columns[3:], values[3:]))


def test_greedy_rows_get_no_noise() -> None:
    assert noise_for([(1, 2, 0.0), (3, 4, 0.0)]) is None
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    columns, values = likeliest(logits, noise_of(4, (0.0, 1e4)))
    assert columns[::2].tolist() == logits[::2].argmax(-1).tolist()
    assert values[::2].tolist() == logits[::2].amax(-1).tolist()
    assert not (columns[1::2] == logits[1::2].argmax(-1).numpy()).any()


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic in standard deviations above its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0, 1e5])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """4.5 standard deviations would be a 1 in 10^5 event."""
    draws, vocab = 40_000, 37
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    exact = torch.softmax(logits.double() / temperature, -1).numpy()
    noise = noise_for([(seed, 7, temperature) for seed in range(draws)])
    columns, _ = likeliest(logits.expand(draws, -1), noise)
    counts = np.bincount(columns, minlength=vocab)
    likely = exact * draws >= 5
    rest = ~likely
    groups = np.append(counts[likely], counts[rest].sum()), np.append(exact[likely], exact[rest].sum()) * draws
    kept = groups[1] > 0
    assert abs(chi_square(groups[0][kept], groups[1][kept])) < 4.5


def test_a_large_vocabulary_is_sampled_evenly() -> None:
    draws, vocab, parts = 3000, 262_144, 64
    noise = noise_for([(seed, 0, 1.0) for seed in range(draws)])
    columns = np.concatenate(
        [likeliest(torch.zeros(1, vocab).expand(100, -1), noise[i : i + 100])[0] for i in range(0, draws, 100)]
        if noise is not None
        else []
    )
    counts = np.bincount(columns * parts // vocab, minlength=parts)
    assert abs(chi_square(counts, np.full(parts, draws / parts))) < 4.5
    assert len(set(columns.tolist())) > draws * 0.98


@pytest.mark.parametrize("step", ["seed", "token", "id"])
def test_neighbours_are_independent(step: str) -> None:
    """Pairs of noise, next to each other in one of what it depends on, fill a table of 16 times 16 evenly."""
    count, cells = 200_000, 16
    ids = np.arange(count // 1000 + 1, dtype=np.uint64)
    keys = {
        "seed": [(1000 + i, 0) for i in range(1001)],
        "token": [(5, i) for i in range(1001)],
        "id": [(i, 9) for i in range(1001)],
    }[step]
    noise = noise_for([(*key, 1.0) for key in keys])
    assert noise is not None
    table = np.stack([hashed(int(key), ids) for key in noise["key"]]) >> np.uint64(28)
    first, second = (table[:, :-1], table[:, 1:]) if step == "id" else (table[:-1], table[1:])
    counts = np.bincount((first * np.uint64(cells) + second).astype(np.int64).ravel(), minlength=cells**2)
    assert counts.sum() >= count
    assert abs(chi_square(counts, np.full(cells**2, counts.sum() / cells**2))) < 4.5
