"""Beam search by brute force: beams are computed anew in each step, all that end are kept, nothing stops early."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

Logits = Callable[[Sequence[int]], torch.Tensor]
"""[V] logits of the token that follows a context."""


class Found(NamedTuple):
    """One sequence without its prompt, and why it ended."""

    tokens: tuple[int, ...]
    cum_logprob: float
    score: float
    ended: bool


def search(
    logits: Logits,
    prompt: Sequence[int],
    *,
    width: int,
    max_tokens: int,
    ends: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
) -> list[Found]:
    """The best `width` sequences; of equals the one that ended earlier, then the likelier parent's."""

    def found(tokens: tuple[int, ...], total: float, *, ended: bool) -> Found:
        length = len(prompt) + len(tokens) - ended
        return Found(tokens, total, total / length**length_penalty, ended)

    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    completed: list[Found] = []
    for _ in range(max_tokens):
        going_on: list[tuple[tuple[int, ...], float]] = []
        for tokens, total in live:
            row = logits([*prompt, *tokens])
            own = torch.log_softmax(row, dim=-1).tolist()
            by_logit = row.tolist()
            for token in sorted(range(len(own)), key=lambda t: (-by_logit[t], t))[: 2 * width]:
                if token in ends:
                    completed.append(found((*tokens, token), total + own[token], ended=True))
                else:
                    going_on.append(((*tokens, token), total + own[token]))
        live = sorted(going_on, key=lambda beam: -beam[1])[:width]
    completed += [found(tokens, total, ended=False) for tokens, total in live]
    return sorted(completed, key=lambda each: -each.score)[:width]


def model_logits(model: PreTrainedModel) -> Logits:
    """A transformers model without a cache."""

    def logits(context: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            row: torch.Tensor = model(torch.tensor([list(context)]), use_cache=False).logits[0, -1]
        return row.float()

    return logits


def coarse_logits(vocab_size: int, seed: int) -> Logits:
    """A model that is a hash of the context, with so few different values that many beams are equally likely."""

    def logits(context: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(bytes(context), seed))
        return torch.randint(0, 4, (vocab_size,), generator=generator).float()

    return logits
