"""What a request returns, shaped as vLLM's outputs so that scripts move over by changing the import. A leaf."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Attributes:
    logprob: natural logarithm of the token's probability, before temperature and penalties.
    rank: 1 for the likeliest token.
    decoded_token: the token as text, or None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id to logprob: the chosen token and the likeliest alternatives, at one position."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n samples, or of the sequences that its beam search found.

    Attributes:
        index: 0 to n - 1; of beams, and of the best of more samples than n, the best is 0.
        text: all text so far, without the stop string unless it was asked for.
        token_ids: all tokens so far, with the end token.
        cumulative_logprob: sum of the chosen tokens' logprobs; None unless logprobs were asked for, or outputs are
            ranked by it.
        logprobs: one entry per token; None unless asked for.
        finish_reason: "stop", "length", "abort", "error", or None while running.
        stop_reason: the stop string or stop token id that ended it; None for the end token and other reasons.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times are `time.monotonic()` seconds; None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A request's state, cumulative: every output carries all text and tokens so far.

    Attributes:
        prompt: the text, or None where the request came as token ids.
        prompt_logprobs: one entry per prompt token, None for the first; None unless asked for.
        num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
        error: why the request failed, where a finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: Exception | None = field(default=None, repr=False)


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence that `LLM.beam_search` found.

    Attributes:
        tokens: of the prompt and what came after it, with the end token.
        logprobs: one entry per generated token.
        cum_logprob: sum of the generated tokens' log probabilities.
        text: the prompt's and what came after it.
        finish_reason, stop_reason: as in `CompletionOutput`.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What `LLM.beam_search` found for one prompt, best first."""

    sequences: list[BeamSearchSequence]
