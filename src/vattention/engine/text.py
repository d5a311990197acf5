"""A sequence's text as its tokens come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from vattention.model.detokenizer import Detokenizer
from vattention.model.stop import StopChecker
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import TokenLogprobs
from vattention.sampling_params import SamplingParams


class TextStream:
    """Tokens in, text out.

    Attributes:
        text: everything that is final so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stop = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        self.text = ""

    def add(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take the next token; returns the stop string that has ended the text with it, if one has.

        Args:
            may_stop: whether a stop string counts already, which it does not before min_tokens.
        """
        news = self._detokenizer.add([token_id])
        self.text += self._stop.add(news) if may_stop else self._stop.pass_by(news)
        return self._stop.found

    def spell_out(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        """The same logprobs, with each token's text."""
        return {
            token: replace(logprob, decoded_token=self._tokenizer.token_text(token))
            for token, logprob in logprobs.items()
        }

    def copy(self) -> TextStream:
        """The same text, which goes its own way from here."""
        twin = copy.copy(self)
        twin._detokenizer, twin._stop = self._detokenizer.copy(), copy.copy(self._stop)
        return twin

    def finish(self) -> None:
        """No more tokens will come: what was held back is final, unless a stop string ended the text before it."""
        if self._stop.found is None:
            self.text += self._stop.add(self._detokenizer.flush())
            self.text += self._stop.flush()
