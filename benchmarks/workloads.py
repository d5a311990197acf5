"""The benchmark's workloads: fixed lists of requests as token ids, so that every engine gets the same work.

    python benchmarks/workloads.py w1 > w1.jsonl
    python benchmarks/workloads.py w6 16 1024 > w6-16x1024.jsonl

Ids lie in [1000, 32000): they are ordinary tokens in the vocabulary of every model measured here. Each list comes
from its own seeded generator; a test pins the lists by checksum, so that figures stay comparable over time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Request = dict[str, Any]
"""A line of the file that `vattention bench throughput --requests` reads."""

FIRST_ID, LAST_ID = 1000, 31999
LENGTH_SIGMA = 0.8
"""Spread of the lognormal lengths in w1."""

W6_BATCHES = (1, 4, 16, 64)
W6_CONTEXTS = (256, 1024)


def w1(count: int = 64, seed: int = 0) -> list[Request]:
    """Offline throughput: lengths spread as in chat logs, 160 tokens in and 128 out on average."""
    rng = np.random.default_rng([seed, 1])
    num_prompt = _lognormal(rng, mean=160, count=count, shortest=16, longest=1024)
    num_output = _lognormal(rng, mean=128, count=count, shortest=16, longest=512)
    return [_request(_ids(rng, num_in), num_out) for num_in, num_out in zip(num_prompt, num_output, strict=True)]


def w2(seed: int = 0) -> list[Request]:
    """A single stream: 128 tokens in, 128 out."""
    return [_request(_ids(np.random.default_rng([seed, 2]), 128), 128)]


def w3(seed: int = 0) -> list[Request]:
    """A long prompt: 4,096 tokens in, 16 out. What counts is the time to the first token."""
    return [_request(_ids(np.random.default_rng([seed, 3]), 4096), 16)]


def w4(count: int = 32, common: int = 1024, unique: int = 32, out: int = 32, seed: int = 0) -> list[Request]:
    """A shared prefix: all prompts have their first `common` tokens in common."""
    rng = np.random.default_rng([seed, 4])
    prefix = _ids(rng, common)
    return [_request([*prefix, *_ids(rng, unique)], out) for _ in range(count)]


def w5(seed: int = 0) -> list[Request]:
    """Parallel sampling: 8 samples of 64 tokens from a prompt of 512."""
    return [_request(_ids(np.random.default_rng([seed, 5]), 512), 64, n=8, temperature=1.0)]


def w6(batch: int, context: int, out: int = 32, seed: int = 0) -> list[Request]:
    """Decode scaling: `batch` prompts of `context` tokens.

    The decode rate is batch * (out - 1) tokens over the difference in time between this list and the one with
    out = 1, which differs from it in nothing but max_tokens.
    """
    rng = np.random.default_rng([seed, 6, batch, context])
    return [_request(_ids(rng, context), out) for _ in range(batch)]


WORKLOADS: dict[str, Callable[..., list[Request]]] = {"w1": w1, "w2": w2, "w3": w3, "w4": w4, "w5": w5, "w6": w6}


def _request(token_ids: list[int], max_tokens: int, *, n: int | None = None, temperature: float = 0.0) -> Request:
    request = {
        "prompt_token_ids": token_ids,
        "max_tokens": int(max_tokens),
        "ignore_eos": True,
        "temperature": temperature,
    }
    return request if n is None else {**request, "n": n}


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in rng.integers(FIRST_ID, LAST_ID + 1, size=int(count))]


def _lognormal(
    rng: np.random.Generator, *, mean: float, count: int, shortest: int, longest: int
) -> NDArray[np.int64]:
    """Lengths from a lognormal distribution with this mean, rounded, then clipped."""
    location = np.log(mean) - LENGTH_SIGMA**2 / 2
    lengths = np.rint(rng.lognormal(location, LENGTH_SIGMA, count))
    return np.clip(lengths, shortest, longest).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a workload as JSON lines.")
    parser.add_argument("name", choices=sorted(WORKLOADS))
    parser.add_argument(
        "numbers", nargs="*", type=int, help="the workload's arguments in order, as for w6: batch context"
    )
    arguments = parser.parse_args()
    for request in WORKLOADS[arguments.name](*arguments.numbers):
        print(json.dumps(request))


if __name__ == "__main__":
    main()
