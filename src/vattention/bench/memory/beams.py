"""Beam search without a model: a manager's forks and releases along a random tree.

What sharing saves depends on the tree alone, on how soon beams have a common ancestor again; so the search itself
runs (the best candidates of all beams go on) over a language model that knows nothing: each next-token distribution
is a softmax over independent Gaussian logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vattention.bench.memory.meter import Meter
from vattention.bench.memory.trace import Trace
from vattention.kv.manager import KVManager

LOGITS = 400
SPREAD = 2.7
"""Gaussian logits of this deviation over so many tokens have an entropy of about 2.5 nats, as text has for a small
language model."""

READ_EVERY = 4
"""Tokens between two readings of the accounts."""


def parents(scores: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One step of beam search: which beams go on, and with what score.

    Args:
        scores: [width] the beams' summed log-probabilities.

    Returns:
        [width] the beam that each new one continues, and the new scores.
    """
    width = len(scores)
    logits = SPREAD * rng.standard_normal((width, LOGITS), np.float32)
    best = np.partition(logits, LOGITS - width, axis=1)[:, LOGITS - width :]
    best = best - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    candidates = (scores[:, None] + best).ravel()
    chosen = np.argsort(-candidates, kind="stable")[:width]
    return chosen // width, candidates[chosen]


def search(manager: KVManager, trace: Trace, width: int, seed: int, meter: Meter) -> None:
    """Beam search for each request of a trace, one after the other; every step counts the same to `meter`.

    Raises:
        OutOfMemoryError: a request's beams do not fit into the manager's memory.
    """
    rng = np.random.default_rng([seed, width])
    for prompt, output in zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True):
        first = manager.take([0] * prompt, max_tokens=prompt + output).slot
        manager.ensure(first, 0, prompt)
        slots = [first] + [manager.fork(first, prompt) for _ in range(width - 1)]
        scores = np.where(np.arange(width) == 0, 0.0, -np.inf)
        for length in range(prompt, prompt + output):
            chosen, scores = parents(scores, rng)
            if length > prompt:
                slots = _follow(manager, slots, chosen.tolist(), length)
            for slot in slots:
                manager.ensure(slot, length, length + 1)
            if length % READ_EVERY == 0:
                accounts = manager.accounts()
                meter.add(accounts, 1.0, held_nbytes=accounts.live_nbytes, num_batched=width, num_waiting=0)
        for slot in slots:
            manager.release(slot)


def _follow(manager: KVManager, slots: list[int], chosen: list[int], length: int) -> list[int]:
    """The slots of the new beams: a beam's first heir keeps its slot, others fork it, and without heirs it ends."""
    for beam, slot in enumerate(slots):
        if beam not in chosen:
            manager.release(slot)
    heirs: set[int] = set()
    following = []
    for beam in chosen:
        following.append(manager.fork(slots[beam], length) if beam in heirs else slots[beam])
        heirs.add(beam)
    return following
