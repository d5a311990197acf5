"""What a forward pass says of the sequences it computed: next tokens, what beams propose, logprobs of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vattention.engine.plan import Plan
from vattention.engine.sequence import Sequence
from vattention.model import sampler
from vattention.model.predictions import Predictions
from vattention.model.proposals import Proposals, propose
from vattention.model.sampler import SampledToken


@dataclass(slots=True)
class Draws:
    """What sequences go on with that have computed all of their tokens.

    Attributes:
        sampling: those that get a token each, `tokens`; samples that are to fork from one of them are behind it.
        beams: those of searches, with what each one may go on with, `proposals`.
    """

    sampling: list[Sequence] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    beams: list[Sequence] = field(default_factory=list)
    proposals: list[Proposals] = field(default_factory=list)


def sample(plan: Plan, predictions: Predictions) -> Draws:
    """From the rows that the plan's chunks asked for; those of prompts are reported to their requests."""
    draws = Draws()
    rows: list[int] = []
    beam_rows: list[int] = []
    end = 0
    for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
        begin, end = end, end + chunk.num_logits
        if sequence.index == 0 and sequence.request.params.prompt_logprobs is not None:
            _report_prompt(sequence, chunk.end - chunk.num_logits, predictions.logits(range(begin, end)))
        if chunk.end == sequence.num_tokens and sequence.request.beams is not None:
            draws.beams.append(sequence)
            beam_rows.append(end - 1)
        elif chunk.end == sequence.num_tokens:
            samples = [sequence, *sequence.request.unforked]
            draws.sampling += samples
            rows += [end - 1] * len(samples)
    draws.tokens = sampler.sample(predictions, rows, [sequence.sample_row() for sequence in draws.sampling])
    if draws.beams:
        draws.proposals = _propose(predictions, beam_rows, draws.beams)
    return draws


def _propose(predictions: Predictions, rows: list[int], beams: list[Sequence]) -> list[Proposals]:
    return propose(
        predictions.logits(rows),
        [beam.sample_row() for beam in beams],
        [beam.request.beams.num_proposals for beam in beams if beam.request.beams is not None],
    )


def _report_prompt(sequence: Sequence, start: int, logits: torch.Tensor) -> None:
    """Row i of `logits` foretells the prompt's token start + i + 1."""
    request, text = sequence.request, sequence.text
    if request.prompt_logprobs is None:
        request.prompt_logprobs = [None]
    known = len(request.prompt_logprobs)
    tokens = request.prompt_token_ids[known : start + len(logits) + 1]
    if tokens:
        first = known - 1 - start
        count = request.params.prompt_logprobs or 0
        report = sampler.prompt_logprobs(logits[first : first + len(tokens)], tokens, count)
        request.prompt_logprobs.extend(text.spell_out(entry) if text is not None else entry for entry in report)
