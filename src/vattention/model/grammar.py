"""Grammars that a text has to follow: which tokens may come next, by llguidance."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from vattention.errors import RequestError, VAttentionError
from vattention.model.draw import Row
from vattention.model.spelling import inner_encoder, spellings
from vattention.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

PAUSE_S = 0.1
"""Between two calls that hold Python's lock for long: without it other threads get no step done between them."""


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
    """Grammars for one model. Thread-safe.

    Args:
        end_token_ids: tokens that may come where a text of a grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._reading = Lock()
        self._vocabulary: LLTokenizer | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the vocabulary has been read."""
        return self._vocabulary is not None

    def read_vocabulary(self) -> LLTokenizer:
        """Read it if nobody has: the first grammar does, if this was not called before.

        Of 262,144 tokens that takes some 1.7 seconds; other threads stand still for two parts of it, of 0.6 and 0.7
        seconds, and run between them.

        Raises:
            RequestError: the tokenizer does not say what bytes its tokens stand for; `param` is "grammar".
        """
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = self._read()
            return self._vocabulary

    def grammar(self, text: str) -> Grammar:
        """Raises:
        RequestError: it is no grammar, or not for this tokenizer; `param` is "grammar".
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self.read_vocabulary(), LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {_first_line(matcher)}", param="grammar")
        return Grammar(matcher)

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        backend = self._tokenizer.backend
        tokens = spellings(backend)
        ends = sorted(token for token in self._end_token_ids if token < len(tokens))
        ends = ends or [self._tokenizer.eos_token_id or 0]
        wrapper = TokenizerWrapper(_Vocabulary(tokens, ends[0], inner_encoder(backend)))
        bare = LLTokenizer(wrapper, eos_token=ends, slices=[])
        tokens.clear()  # what encodes lives on, and would keep them
        time.sleep(PAUSE_S)
        return bare.with_slices(LLTokenizer.general_slices())


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token_id: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that a grammar forces."""
        return self._encode(text)


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0]
