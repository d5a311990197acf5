"""How the tokens of one request are chosen: vLLM's `SamplingParams` and `BeamSearchParams`. A leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Literal

from vattention.errors import RequestError
from vattention.fields import FieldTypeError, fit
from vattention.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
"""The most alternatives per token that may be asked for, as in OpenAI's chat API."""

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding, as in vLLM."""


@dataclass(slots=True)
class SamplingParams:
    """Sampling parameters with vLLM's names, meanings and defaults. Those of a request are checked again, and
    copied, when it starts.

    Attributes:
        n: samples per prompt, or sequences that a beam search returns.
        temperature: 0 for greedy decoding.
        top_p: sample from the smallest set of tokens whose probabilities sum to at least this; 1 for all.
        top_k: sample from this many likeliest tokens; 0 or -1 for all.
        min_p: drop tokens less likely than this share of the likeliest one's probability.
        seed: makes the samples reproducible; None draws a seed from the engine's.
        stop: strings that end the text.
        stop_token_ids: tokens that end it, besides the model's end tokens.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on past the model's end tokens.
        max_tokens: most tokens to generate; None for as many as the context holds.
        min_tokens: end and stop tokens are impossible before this many.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated: once, and
            once per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id to a number added to its logit.
        allowed_token_ids: the only tokens that may be chosen; all where there are none.
        bad_words: texts that are not to be generated: the last token of one is impossible behind its others.
        logprobs: alternatives to report per generated token; 0 reports the chosen one only, None nothing.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        best_of: samples to draw, of which the n with the highest cumulative log probability are returned; `n` by
            default. In a beam search another name for `beam_width`, as in older versions of vLLM.
        use_beam_search: search for likely sequences instead of drawing. temperature, top_p, top_k, min_p and seed
            then change nothing; min_tokens, logit_bias and penalties shape the probabilities that are searched.
        beam_width: sequences that a beam search follows at a time; `best_of`, or else `n`, by default.
        length_penalty: beams are ranked by cumulative log probability / length ** length_penalty, where the length
            counts the prompt but not the end token. Above 1 it favours longer sequences, below 1 shorter ones.
        early_stopping: when a beam search ends, once `beam_width` sequences have. "never": when no beam can become
            better than those any more, so that the result is the same as at max_tokens; True: at once; False: when
            no beam is better than those at its present length.
        grammar: what the text has to be from beginning to end, in llguidance's dialect of Lark; None for anything.

    `structured_outputs` says the same as `grammar` in other words; it is for the constructor only.

    Raises:
        RequestError: a value is out of range; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = "never"
    grammar: str | None = None
    structured_outputs: InitVar[StructuredOutputsParams | None] = None

    def __post_init__(self, structured_outputs: StructuredOutputsParams | None) -> None:
        if structured_outputs is not None:
            self._constrain(structured_outputs)
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        object.__setattr__(self, "stop", stop)
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        object.__setattr__(self, "logit_bias", _by_token(self.logit_bias))
        _fit(self)
        self._check("n", self.n >= 1, "at least 1")
        self._check("temperature", 0.0 <= self.temperature < float("inf"), "0 or more")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._check("top_k", self.top_k >= -1, "-1 or 0 for all tokens, or at least 1")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "0 or more")
        self._check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens, which is {self.max_tokens}",
        )
        self._check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        self._check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        self._check("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            self._check(name, count is None or 0 <= count <= MAX_LOGPROBS, f"in 0 to {MAX_LOGPROBS}")
        self._check("stop", all(self.stop), "non-empty strings")
        self._check("bad_words", all(word.strip() for word in self.bad_words), "non-empty strings")
        self._check(
            "logit_bias",
            all(k >= 0 and -100.0 <= v <= 100.0 for k, v in self.logit_bias.items()),
            "token ids with numbers in [-100, 100]",
        )
        for name, count in (("best_of", self.best_of), ("beam_width", self.beam_width)):
            self._check(name, count is None or count >= self.n, f"at least n, which is {self.n}")
        self._check("beam_width", self.use_beam_search or self.beam_width is None, "None without use_beam_search")
        self._check(
            "beam_width",
            self.num_sequences == (self.best_of or self.num_sequences),
            "the same as best_of where both are set",
        )
        self._check("length_penalty", abs(self.length_penalty) <= 50.0, "in [-50, 50]")
        self._check(
            "length_penalty", self.use_beam_search or self.length_penalty == 1.0, "1 without use_beam_search"
        )
        self._check("grammar", self.grammar is None or not self.use_beam_search, "None with use_beam_search")
        self._check("grammar", self.grammar is None or not self.ignore_eos, "None with ignore_eos: it says the end")

    def _constrain(self, wanted: StructuredOutputsParams) -> None:
        if not isinstance(wanted, StructuredOutputsParams):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, not {wanted!r}", param="structured_outputs"
            )
        if self.grammar is not None:
            raise RequestError("structured_outputs and grammar say the same; give one of them", param="grammar")
        self.grammar = wanted.lark()

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise RequestError(f"{name} must be {wanted}, not {getattr(self, name)!r}", param=name)

    def clone(self) -> SamplingParams:
        """A copy to change."""
        return replace(self)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def num_sequences(self) -> int:
        """Sequences that run for each prompt: samples drawn, or beams."""
        return self.beam_width or self.best_of or self.n

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to find per token: `logprobs`, or none but the chosen one where samples are ranked by it."""
        return 0 if self.logprobs is None and self.num_sequences > self.n else self.logprobs

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return tuple(self.stop)


def _by_token(bias: Any) -> Any:
    """A bias whose token ids may be strings, as in JSON."""
    if not isinstance(bias, Mapping):
        return {} if bias is None else bias
    return {int(token) if isinstance(token, str) and token.isdecimal() else token: bias[token] for token in bias}


def _fit(params: SamplingParams | BeamSearchParams) -> None:
    try:
        fit(params)
    except FieldTypeError as error:
        raise RequestError(str(error), param=error.field) from None


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """What `LLM.beam_search` takes, with vLLM's names, meanings and defaults.

    Attributes:
        beam_width: sequences that the search follows at a time, and returns.
        max_tokens: most tokens to generate.
        ignore_eos: go on past the model's end tokens.
        temperature: changes nothing: a beam search draws no tokens.
        length_penalty: as in `SamplingParams`.
        include_stop_str_in_output: keep the end token's text.

    Raises:
        RequestError: a value is out of range; `param` names it.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _fit(self)
        if self.beam_width < 1:
            raise RequestError(f"beam_width must be at least 1, not {self.beam_width}", param="beam_width")
        self.sampling()

    def sampling(self) -> SamplingParams:
        """The same as parameters of an ordinary request; log probabilities come with it."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            beam_width=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=min(2 * self.beam_width, MAX_LOGPROBS),
        )
