"""Offline throughput: all requests at once, as fast as the engine can."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from vattention import __version__
from vattention.bench.resident import peak_resident_nbytes, resident_nbytes
from vattention.bench.workload import BenchRequest
from vattention.errors import ConfigError
from vattention.outputs import RequestOutput

if TYPE_CHECKING:
    from vattention.engine.engine import LLMEngine

WARM_UP_REQUESTS = 4
WARM_UP_PROMPT_TOKENS = 128
WARM_UP_OUTPUT_TOKENS = 4


@dataclass(slots=True)
class Timeline:
    """When one request's tokens came, in `time.perf_counter()` seconds.

    Attributes:
        first_token_at: when the first of its samples had its first token.
        gaps: times between consecutive tokens of the same sample.
    """

    first_token_at: float | None = None
    gaps: list[float] = field(default_factory=list)
    _last: dict[int, tuple[int, float]] = field(default_factory=dict)

    def update(self, output: RequestOutput, now: float) -> None:
        """Note what a cumulative output has that the one before had not."""
        for sample in output.outputs:
            count = len(sample.token_ids)
            known, last = self._last.get(sample.index, (0, now))
            if count == known:
                continue
            if self.first_token_at is None:
                self.first_token_at = now
            if known:
                # Tokens that arrive together share the time since the one before them.
                self.gaps.extend([(now - last) / (count - known)] * (count - known))
            self._last[sample.index] = (count, now)

    @property
    def num_tokens(self) -> int:
        return sum(count for count, _ in self._last.values())


@dataclass(frozen=True, slots=True)
class Throughput:
    """The figures of one run. Loading the model and the warm-up come before it and are not in its times.

    Attributes:
        elapsed_s: from the first request's submission to the last token.
        prompt_tokens_per_s, output_tokens_per_s, total_tokens_per_s: over `elapsed_s`; a prompt counts once,
            however many samples it has.
        ttft_p50_s, ttft_p99_s: time to first token, from the run's begin, over requests.
        itl_p50_s, itl_p99_s: inter-token latency, over all pairs of consecutive tokens; None where there are none.
        peak_rss_bytes: most resident memory of the process so far, loading included.
        rss_before_bytes: resident memory just before the run.
        kv_peak: the highest value of each of the cache's accounts (`vattention.kv.manager.Accounts`) after a step.
    """

    elapsed_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float | None
    itl_p99_s: float | None
    peak_rss_bytes: int
    rss_before_bytes: int
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_steps: int
    kv_peak: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything above, and the versions it was measured with."""
        return dataclasses.asdict(self) | {
            "excluded": "model load and warm-up",
            "versions": {"vattention": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        }

    def summary(self) -> str:
        """A few lines for people."""
        between = (
            "none" if self.itl_p50_s is None or self.itl_p99_s is None else _ms(self.itl_p50_s, self.itl_p99_s)
        )
        return "\n".join(
            (
                f"requests    {self.num_requests:,} with {self.num_prompt_tokens:,} prompt tokens and "
                f"{self.num_output_tokens:,} output tokens, in {self.num_steps:,} steps",
                f"time        {self.elapsed_s:.2f} s, without model load and warm-up",
                f"tokens/s    {self.output_tokens_per_s:,.1f} output, {self.prompt_tokens_per_s:,.1f} prompt, "
                f"{self.total_tokens_per_s:,.1f} together",
                f"first token {_ms(self.ttft_p50_s, self.ttft_p99_s)}",
                f"next tokens {between}",
                f"memory      {self.peak_rss_bytes / 2**20:,.0f} MiB resident at the peak, loading included; "
                f"KV cache: {self.kv_peak['mapped_nbytes'] / 2**20:,.0f} MiB mapped of "
                f"{self.kv_peak['reserved_nbytes'] / 2**20:,.0f} MiB reserved",
            )
        )


def _ms(p50_s: float, p99_s: float) -> str:
    return f"p50 {p50_s * 1e3:,.1f} ms, p99 {p99_s * 1e3:,.1f} ms"


def warm_up(engine: LLMEngine, requests: Sequence[BenchRequest]) -> None:
    """Run a few short requests, so that first-use costs (allocation, compilation) fall outside the measurement.

    The prompts are the workload's own, cut and turned round: valid ids that put none of its prefixes in a cache.
    """
    for index, request in enumerate(requests[:WARM_UP_REQUESTS]):
        prompt = list(request.prompt_token_ids[:WARM_UP_PROMPT_TOKENS])[::-1]
        params = dataclasses.replace(request.params, max_tokens=WARM_UP_OUTPUT_TOKENS)
        engine.add_request(f"warm-up-{index}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        _raise_errors(engine.step())


def measure(engine: LLMEngine, requests: Sequence[BenchRequest]) -> Throughput:
    """Submit all requests and step until the last is finished.

    Raises:
        ConfigError: a request got fewer tokens than it asked for, so the figures would be of other work.
        Exception: whatever made a request fail.
    """
    timelines = {str(index): Timeline() for index in range(len(requests))}
    rss_before = resident_nbytes()
    kv_peak: dict[str, int] = {}
    num_steps = 0
    start = time.perf_counter()
    for request_id, request in zip(timelines, requests, strict=True):
        engine.add_request(request_id, {"prompt_token_ids": request.prompt_token_ids}, request.params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        _raise_errors(outputs)
        for output in outputs:
            timelines[output.request_id].update(output, now)
        num_steps += 1
        for name, nbytes in dataclasses.asdict(engine.manager.accounts()).items():
            kv_peak[name] = max(nbytes, kv_peak.get(name, 0))
    elapsed = time.perf_counter() - start
    _check_all_done(requests, timelines)
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum(timeline.num_tokens for timeline in timelines.values())
    firsts = [t.first_token_at - start for t in timelines.values() if t.first_token_at is not None]
    gaps = [gap for timeline in timelines.values() for gap in timeline.gaps]
    ttft_p50, ttft_p99 = np.percentile(firsts, (50, 99)).tolist()
    itl_p50, itl_p99 = np.percentile(gaps, (50, 99)).tolist() if gaps else (None, None)
    return Throughput(
        elapsed_s=elapsed,
        prompt_tokens_per_s=num_prompt / elapsed,
        output_tokens_per_s=num_output / elapsed,
        total_tokens_per_s=(num_prompt + num_output) / elapsed,
        ttft_p50_s=ttft_p50,
        ttft_p99_s=ttft_p99,
        itl_p50_s=itl_p50,
        itl_p99_s=itl_p99,
        peak_rss_bytes=peak_resident_nbytes(),
        rss_before_bytes=rss_before,
        num_requests=len(requests),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_steps=num_steps,
        kv_peak=kv_peak,
    )


def _raise_errors(outputs: Sequence[RequestOutput]) -> None:
    for output in outputs:
        if output.error is not None:
            raise output.error


def _check_all_done(requests: Sequence[BenchRequest], timelines: dict[str, Timeline]) -> None:
    for (request_id, timeline), request in zip(timelines.items(), requests, strict=True):
        wanted = (
            request.params.n * (request.params.max_tokens or 0) if request.params.ignore_eos else request.params.n
        )
        if timeline.num_tokens < wanted:
            raise ConfigError(
                f"request {request_id} got {timeline.num_tokens} of {wanted} tokens; raise max_model_len to "
                f"{len(request.prompt_token_ids) + (request.params.max_tokens or 0)}"
            )
