"""Token ids to text as they come, without ever taking text back."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from vattention.model.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first ones are decoded after; they decide about leading spaces."""

WINDOW_TOKENS = 16
"""Longest run of tokens that is decoded again with each new token, but for a moment."""

CHARACTER_TOKENS = 4
"""Most tokens that one character can take: UTF-8 has four bytes at most."""

INCOMPLETE = "\ufffd"
"""What a decoder makes of bytes that are no UTF-8, or not yet."""


class Detokenizer:
    """The text of one sequence, token by token.

    Each new token is decoded together with a few before it, since a token's text depends on its neighbours. Text
    that ends in the middle of a character is held back until the character is complete or can no longer become so.

    What `add` and `flush` return adds up to what decoding prompt and output at once shows after the prompt's text.
    Only where a tokenizer falls back to bytes, and these are no valid UTF-8, may the number of U+FFFD differ.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._context(prompt_token_ids)
        self._clean = len(self._window)  # tokens of the window up to its last whole character
        self._shown = len(self._decode())  # characters of the window's text given out

    def add(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that has become final with them."""
        parts = []
        for token_id in token_ids:
            self._window.append(token_id)
            parts.append(self._advance())
        return "".join(parts)

    def flush(self) -> str:
        """The rest of the text, complete or not."""
        text = self._decode()[self._shown :]
        self._shown += len(text)
        return text

    def copy(self) -> Detokenizer:
        """The same text so far, for tokens of its own."""
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def _advance(self) -> str:
        text = self._decode()
        end = len(text)
        if text.endswith(INCOMPLETE):
            if len(self._window) - self._clean <= CHARACTER_TOKENS:
                return ""
            # Whatever began so long ago is no character; only the last one may still become one.
            end -= 1
            news = text[self._shown : end]
            self._shown = max(self._shown, end)
            if len(self._window) > 2 * WINDOW_TOKENS:
                self._restart(len(self._window) - CHARACTER_TOKENS - 1, held_back=1)
            return news
        if end <= self._shown:
            return ""  # a special token that is left out; as context it would not do
        news = text[self._shown :]
        previous, self._clean = self._clean, len(self._window)
        self._shown = end
        if len(self._window) > WINDOW_TOKENS:
            self._restart(previous, held_back=0)
        return news

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character on."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
            window = list(prompt_token_ids[-count:])
            if not self._tokenizer.decode(window, self._skip).startswith(INCOMPLETE):
                break
        return window

    def _restart(self, first: int, held_back: int) -> None:
        """Drop the window's tokens before `first`; all but the last `held_back` characters are given out."""
        del self._window[:first]
        self._clean = max(self._clean - first, 0)
        self._shown = max(len(self._decode()) - held_back, 0)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)
