"""One request: a prompt, how to sample from it, and its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from vattention.engine.beams import BeamGroup
from vattention.engine.sequence import Sequence
from vattention.model.grammar import Grammar
from vattention.outputs import RequestMetrics, RequestOutput, TokenLogprobs
from vattention.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """What was asked for, checked, and what has become of it.

    Attributes:
        text: the prompt as it came, or None where it came as token ids.
        priority: smaller goes first.
        arrival: counts requests; within a priority the earlier goes first.
        max_tokens: of each sequence, already cut to the context's end.
        end_token_ids: the model's end tokens.
        bad_words: those of the parameters, as tokens.
        grammar: what its samples' texts have to be; None for anything.
        cache_salt: requests share prefixes only with those of the same salt.
        beams: of a beam search; None for samples. `sequences` are then those of the group.
        unforked: samples that begin when the first one has computed the prompt for all.
        num_cached_tokens: prompt tokens found in the prefix cache; None before it first ran.
    """

    id: str
    text: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    arrival: int
    max_tokens: int
    end_token_ids: frozenset[int]
    metrics: RequestMetrics
    bad_words: list[list[int]] = field(default_factory=list)
    grammar: Grammar | None = None
    cache_salt: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    unforked: list[Sequence] = field(default_factory=list)
    beams: BeamGroup | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(sequence.output_token_ids) for sequence in self.sequences)

    def take_unforked(self) -> list[Sequence]:
        """Those samples, which are nobody's afterwards."""
        samples, self.unforked = self.unforked, []
        return samples

    def take_dependants(self) -> list[Sequence]:
        """Sequences that cannot go on if one of the request's fails: samples not forked yet, and beams."""
        return self.take_unforked() if self.beams is None else list(self.beams.live)

    def _returned(self) -> list[Sequence]:
        """The sequences that were asked for: of more samples than that, those most likely so far."""
        n, sequences = self.params.n, self.sequences
        if self.beams is None and len(sequences) > n:
            sequences = sorted(sequences, key=lambda sequence: -sequence.cumulative_logprob)
        return sequences[:n]

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.id,
            prompt=self.text,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output(index) for index, sequence in enumerate(self._returned())],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens or 0,
            metrics=self.metrics,
            error=self.error,
        )
