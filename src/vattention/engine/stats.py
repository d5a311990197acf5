"""What the engine tells of itself: figures for metrics and logs, as plain values.

A listener hears of every step and of every finished request, on the engine's thread: it must be quick, and take
its own lock where others read what it collects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vattention.outputs import RequestMetrics

if TYPE_CHECKING:
    from vattention.engine.plan import Plan
    from vattention.engine.request import Request
    from vattention.engine.sequence import Sequence
    from vattention.kv.manager import Accounts

_GRAVITY = ("error", "abort", "length", "stop")
"""Finish reasons, gravest first."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """The engine at one moment. Lengths are in sequences: a request with n samples counts n times.

    Attributes:
        num_running: sequences that own a slot.
        num_waiting: sequences that wait for one.
        num_slots: most that can run.
        accounts: the KV cache's memory.
        num_swapped: of those waiting, how many have keys and values in the swap space.
        swapped_nbytes: what they have there.
        swap_space_nbytes: most that may be there.
    """

    num_running: int
    num_waiting: int
    num_slots: int
    accounts: Accounts
    num_swapped: int = 0
    swapped_nbytes: int = 0
    swap_space_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step.

    Attributes:
        num_prompt_tokens: prompt tokens computed, those computed again after a preemption included.
        num_looked_up_tokens: tokens that sequences which got a slot asked the prefix cache for.
        num_cached_tokens: of those, tokens that it had.
        num_generated_tokens: tokens sampled.
        num_preemptions: sequences that lost their slot.
        duration_s: of the step.
        num_running, num_waiting: sequences after it.
        times_to_first_token_s: since their request's arrival, of sequences that got their first token.
        inter_token_latencies_s: since their token before, of sequences that got another token.
    """

    num_prompt_tokens: int
    num_looked_up_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    duration_s: float
    num_running: int
    num_waiting: int
    times_to_first_token_s: Items[float]
    inter_token_latencies_s: Items[float]


@dataclass(frozen=True, slots=True)
class FinishedStats:
    """A request that has ended, with all of its samples.

    Attributes:
        finish_reason: "stop", "length", "abort" or "error": the gravest of its samples'.
        num_generated_tokens: of all samples together.
        num_longest_tokens: of the longest sample.
        num_cached_tokens: prompt tokens that needed no computing.
        metrics: when it arrived, started, got its first token and ended.
        num_sequences: that the tokens were generated for: more than n where the best of them are returned.
        n, max_tokens: as asked for; max_tokens is None where the request named none.
    """

    finish_reason: str
    num_prompt_tokens: int
    num_generated_tokens: int
    num_longest_tokens: int
    num_cached_tokens: int
    metrics: RequestMetrics
    num_sequences: int
    n: int
    max_tokens: int | None


class StatsListener(Protocol):
    """Hears what the engine does. An exception from it ends the engine, as one of the engine's own would."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...


class Stats:
    """Turns what happened into figures for `listeners`. Without listeners it does nothing.

    Add listeners before the first request: a sequence's tokens are timed from the first one they hear of.
    """

    def __init__(self) -> None:
        self.listeners: list[StatsListener] = []

    def step(self, plan: Plan, moved: Items[Sequence], started: float, num_running: int, num_waiting: int) -> None:
        """Report a step that began at `started` (monotonic seconds) and brought the `moved` sequences on."""
        if not self.listeners:
            return
        now = time.monotonic()
        advanced = [sequence for sequence in moved if sequence.finish_reason != "error"]
        firsts: list[float] = []
        others: list[float] = []
        for sequence in advanced:
            if sequence.last_token_at is None:
                firsts.append(now - sequence.request.metrics.arrival_time)
            else:
                others.append(now - sequence.last_token_at)
            sequence.last_token_at = now
        stats = StepStats(
            num_prompt_tokens=_num_prompt_tokens(plan),
            num_looked_up_tokens=plan.num_looked_up_tokens,
            num_cached_tokens=plan.num_cached_tokens,
            num_generated_tokens=len(advanced),
            num_preemptions=len(plan.preempted),
            duration_s=now - started,
            num_running=num_running,
            num_waiting=num_waiting,
            times_to_first_token_s=firsts,
            inter_token_latencies_s=others,
        )
        for listener in self.listeners:
            listener.on_step(stats)

    def finished(self, request: Request) -> None:
        """Report a request whose samples have all ended."""
        if not self.listeners:
            return
        reasons = {sequence.finish_reason for sequence in request.sequences}
        stats = FinishedStats(
            finish_reason=next((reason for reason in _GRAVITY if reason in reasons), "error"),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_generated_tokens=request.num_generated_tokens,
            num_longest_tokens=max(len(sequence.output_token_ids) for sequence in request.sequences),
            num_cached_tokens=request.num_cached_tokens or 0,
            metrics=request.metrics,
            num_sequences=len(request.sequences),
            n=request.params.n,
            max_tokens=request.params.max_tokens,
        )
        for listener in self.listeners:
            listener.on_finished(stats)


def _num_prompt_tokens(plan: Plan) -> int:
    return sum(
        max(0, min(chunk.end, len(sequence.request.prompt_token_ids)) - chunk.start)
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True)
    )
