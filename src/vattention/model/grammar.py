"""Grammars that a text has to follow: which tokens may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from vattention.errors import RequestError, VAttentionError
from vattention.model.draw import Row
from vattention.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarMask:
    """What one text may go on with."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_consumed = 0

    def apply(self, row: Row, output_token_ids: Sequence[int]) -> None:
        """Make all tokens impossible, in place, after which the text could not become one of the grammar.

        Args:
            row: [V] logits of the next token.
            output_token_ids: the text so far: what it was in the last call, and perhaps more.

        Raises:
            VAttentionError: the grammar is too large to be followed.
        """
        self._matcher.consume_tokens(list(output_token_ids[self._num_consumed :]))
        self._num_consumed = len(output_token_ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise VAttentionError(f"the grammar cannot be followed: {_first_line(self._matcher)}")
        allowed = np.zeros(len(row), bool)
        known = np.unpackbits(bits, bitorder="little")[: len(row)]
        allowed[: len(known)] = known
        row[~allowed] = -np.inf


class Grammar:
    """A grammar that is ready for use."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> GrammarMask:
        """For a text that begins."""
        return GrammarMask(self._matcher.deep_copy())


class Grammars:
    """Grammars for one model.

    Args:
        end_token_ids: tokens that may come where a text of a grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Read when the first grammar comes: four seconds for 262,144 tokens, in which Python does nothing else."""
        from llguidance import LLTokenizer

        ends = sorted(token for token in self._end_token_ids if token < self._tokenizer.vocab_size)
        return LLTokenizer(self._tokenizer.to_json(), eos_token=ends or None)

    def grammar(self, text: str) -> Grammar:
        """Raises:
        RequestError: it is no grammar; `param` is "grammar".
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {_first_line(matcher)}", param="grammar")
        return Grammar(matcher)


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0]
