"""The vocabulary that more than one room speaks: a leaf, importing nothing of this package.

slot     one row of the KV cache's virtual range; a running sequence owns one
page     the unit of physical memory mapped behind a slot
chunk    one sequence's share of one forward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text, in a mapping as vLLM takes it.

    `cache_salt` keeps its keys and values from requests that do not bring the same.
    """

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, which no tokenizer touches."""

    prompt_token_ids: Sequence[int]
    cache_salt: NotRequired[str]


Prompt = str | TextPrompt | TokensPrompt
"""What a request may start from. Token ids alone, without a mapping around them, do as well."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The consecutive tokens of one sequence that one forward pass computes.

    Attributes:
        slot: where the sequence's keys and values are.
        start: position of the first token; the cache already holds tokens [0, start).
        token_ids: the tokens at positions [start, start + len(token_ids)).
        num_logits: how many of the chunk's last tokens need logits: 0 in the middle of a prompt, 1 before
            sampling, all of them for prompt logprobs.
    """

    slot: int
    start: int
    token_ids: Sequence[int]
    num_logits: int

    @property
    def end(self) -> int:
        """Tokens in the cache after the forward."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes, found by probing the model.

    Attributes:
        num_heads, num_kv_heads: query heads, and key/value heads they share (grouped-query attention).
        key_dim, value_dim: numbers per head; they differ in some models.
        scale: factor on the scores before the softmax.
        window: each token sees itself and the window - 1 tokens before it; None for all tokens before it.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        has_sinks: one learned logit per head joins the softmax's denominator.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
