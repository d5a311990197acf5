"""Requests as chat and instruction services see them: drawn lengths and arrivals, the same for every manager."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: lognormal, rounded, and clipped to [1, longest].

    Attributes:
        mean: of the lengths after rounding and clipping.
        sigma: standard deviation of the lengths' logarithms before clipping.
    """

    mean: float
    sigma: float
    longest: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths whose own mean is `mean`, as nearly as whole tokens allow.

        One comes from each of `count` equally likely parts of the distribution, in random order, so that a few have
        its spread too. Rounding and clipping move a lognormal's mean; so the distribution is scaled until the mean
        of what was drawn is right.
        """
        quantiles = (rng.permutation(count) + rng.uniform(0.001, 0.999, count)) / count
        normal = np.array([NormalDist().inv_cdf(quantile) for quantile in quantiles.tolist()])
        low, high = np.log(self.mean) - 6 * self.sigma, np.log(self.mean) + 6 * self.sigma
        for _ in range(60):
            middle = (low + high) / 2
            if self._cut(normal, middle).mean() < self.mean:
                low = middle
            else:
                high = middle
        return self._cut(normal, high)

    def _cut(self, normal: NDArray[np.float64], centre: float) -> NDArray[np.int64]:
        drawn = np.rint(np.exp(centre + self.sigma * normal))
        return np.clip(drawn, 1, self.longest).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompt and output lengths; one says nothing about the other."""

    name: str
    prompts: Lengths
    outputs: Lengths


SHAREGPT = Dataset("ShareGPT-like", Lengths(161, 1.0, 1023), Lengths(338, 0.9, 1023))
ALPACA = Dataset("Alpaca-like", Lengths(19, 0.5, 255), Lengths(58, 1.0, 1023))
"""Means of the two data sets as PagedAttention's paper gives them (section 6.1, figure 11); the spread is a guess,
and prompt and output together fit the 2,048 tokens of OPT's context."""


@dataclass(frozen=True)
class Trace:
    """A run's requests, in order of arrival.

    Attributes:
        arrivals_s: [n] seconds since the run's begin, ascending.
        prompts, outputs: [n] lengths in tokens.
    """

    arrivals_s: NDArray[np.float64]
    prompts: NDArray[np.int64]
    outputs: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrivals_s)


def draw_trace(dataset: Dataset, *, count: int, requests_per_s: float, seed: int) -> Trace:
    """Poisson arrivals at `requests_per_s`, lengths from `dataset`; the same for the same arguments anywhere."""
    rng = np.random.default_rng(seed)
    return Trace(
        arrivals_s=np.cumsum(rng.exponential(1 / requests_per_s, count)),
        prompts=dataset.prompts.draw(rng, count),
        outputs=dataset.outputs.draw(rng, count),
    )
