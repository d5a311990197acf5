"""One sample of a request: its tokens, where its keys and values are, and how far its text has got."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vattention.engine.text import TextStream
from vattention.model.sampler import SampledToken, SampleRow
from vattention.outputs import CompletionOutput, TokenLogprobs

if TYPE_CHECKING:
    from vattention.engine.request import Request
    from vattention.kv.swap import Image


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens generated after it.

    Attributes:
        request: whose sample it is.
        index: which of the request's n samples.
        seed: of its sampling; with the number of tokens generated it determines every draw.
        text: None where there is no tokenizer.
        output_token_ids: generated so far.
        slot: where its keys and values are; None while it waits.
        num_computed: tokens whose keys and values are in the slot.
        num_promised: tokens that others may wait for to find in the prefix cache, known when it got its slot.
        image: its first tokens' keys and values outside the cache, while it waits for a slot to put them in.
        finish_reason: None while it runs.
        last_token_at: when it got its last token, in seconds of `time.monotonic()`; None before the first.
    """

    request: Request
    index: int
    seed: int
    text: TextStream | None
    output_token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    num_computed: int = 0
    num_promised: int = 0
    image: Image | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    last_token_at: float | None = None
    _sample_row: SampleRow | None = field(default=None, init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_computable(self) -> int:
        """Tokens that it may compute now: all, unless other beams are to fork from it first."""
        beams = self.request.beams
        return self.num_tokens if beams is None else beams.num_computable(self)

    @property
    def wanted_token_ids(self) -> list[int]:
        """The tokens that it will compute or find in the cache once it has a slot."""
        return self.token_ids(0, min(self.num_computable + 1, self.num_tokens))

    @property
    def reports_prompt(self) -> bool:
        """Whether logits of prompt tokens are still to be reported."""
        request = self.request
        return (
            request.params.prompt_logprobs is not None
            and self.index == 0
            and len(request.prompt_logprobs or ()) < len(request.prompt_token_ids)
        )

    @property
    def priority(self) -> tuple[int, int, int]:
        """Smaller goes first: the request's priority, then first come first served."""
        return (self.request.priority, self.request.arrival, self.index)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and output."""
        prompt = self.request.prompt_token_ids
        cut = len(prompt)
        if end <= cut:
            return prompt[start:end]
        return prompt[start:] + self.output_token_ids[max(start - cut, 0) : end - cut]

    def sample_row(self) -> SampleRow:
        """What the sampler needs to choose the next token: the same object for all of them."""
        if self._sample_row is None:
            self._sample_row = SampleRow(
                params=self.request.params,
                seed=self.seed,
                prompt_token_ids=self.request.prompt_token_ids,
                output_token_ids=self.output_token_ids,
                end_token_ids=self.request.end_token_ids,
                bad_words=self.request.bad_words,
                mask=None if self.request.grammar is None else self.request.grammar.mask(),
            )
        return self._sample_row

    def append(self, sampled: SampledToken) -> None:
        """Take the next token, extend the text, and finish where the token, the text or the length says so."""
        token, params = sampled.token_id, self.request.params
        self.output_token_ids.append(token)
        if sampled.logprob is not None:
            self.cumulative_logprob += sampled.logprob
            self.logprobs.append(self.text.spell_out(sampled.top) if self.text is not None else sampled.top)
        enough = len(self.output_token_ids) >= params.min_tokens
        if enough and not params.ignore_eos and token in self.request.end_token_ids:
            self.finish("stop", None, ending=token)
        elif enough and token in params.stop_token_ids:
            self.finish("stop", token, ending=token)
        else:
            stop = self.text.add(token, may_stop=enough) if self.text is not None else None
            if stop is not None:
                self.finish("stop", stop)
            elif len(self.output_token_ids) >= self.request.max_tokens:
                self.finish("length", None)

    def free_image(self) -> None:
        """What is kept of it outside the cache is not needed any more."""
        image, self.image = self.image, None
        if image is not None:
            image.free()

    def branch(self, index: int) -> Sequence:
        """Another sequence with the same tokens and text, which has no slot and goes its own way from here."""
        return replace(
            self,
            index=index,
            text=self.text.copy() if self.text is not None else None,
            output_token_ids=list(self.output_token_ids),
            logprobs=list(self.logprobs),
            slot=None,
            num_computed=0,
            num_promised=0,
        )

    def finish(self, reason: str, stop_reason: int | str | None = None, *, ending: int | None = None) -> None:
        """End the sequence. `ending` is a token that ended it, whose text is kept only on request."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.text is not None:
            if ending is not None and self.request.params.include_stop_str_in_output:
                self.text.add(ending, may_stop=False)
            self.text.finish()

    def output(self, index: int) -> CompletionOutput:
        """Its state as the request's output number `index`."""
        params = self.request.params
        wants_logprobs = params.logprobs is not None
        is_ranked = params.use_beam_search or params.num_sequences > params.n
        return CompletionOutput(
            index=index,
            text=self.text.text if self.text is not None else "",
            token_ids=list(self.output_token_ids),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs or is_ranked else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
