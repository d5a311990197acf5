"""What every engine's script shares: read work, run it cold, warm and measured, write figures.

A script runs in its engine's own environment, which has numpy but need not have torch, so nothing here imports it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vattention.bench.resident import peak_resident_nbytes, resident_nbytes
from vattention.bench.throughput import WARM_UP_OUTPUT_TOKENS, WARM_UP_PROMPT_TOKENS, WARM_UP_REQUESTS
from vattention.bench.workload import BenchRequest, parse_requests

COLD_PROMPT_TOKENS = 16
SPINNING_S = 0.5
"""For how long at most threads that wait for the next piece of work still look for it without sleeping."""


@dataclass(slots=True)
class Sample:
    """One output: its tokens, and when each was there, in `time.perf_counter()` seconds."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def extend(self, token_ids: Sequence[int], now: float) -> None:
        """Note tokens that came at the same time; they share the time since the one before them."""
        last = self.times[-1] if self.times else now
        step = (now - last) / max(1, len(token_ids))
        self.token_ids.extend(token_ids)
        self.times.extend(last + step * (index + 1) for index in range(len(token_ids)))


class Engine(Protocol):
    """An engine with its model loaded."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose versions go into the figures."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was set differently from the engine's defaults, for the figures."""

    def prepare(self, load: Load) -> None:
        """Get ready for work of this size, for an engine that is made for one; called before each workload."""

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        """Complete all requests, submitted at once; the n samples of each, in order."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """How large the work is, for engines that must be told beforehand.

    Attributes:
        longest: tokens of the longest prompt with its output.
        num_sequences: samples of all requests together.
        uniform: all requests have the same lengths.
    """

    longest: int
    num_sequences: int
    uniform: bool

    @classmethod
    def of(cls, requests: Sequence[BenchRequest]) -> Load:
        return cls(
            longest=max(len(request.prompt_token_ids) + num_wanted(request) for request in requests),
            num_sequences=sum(request.params.n for request in requests),
            uniform=len({(len(request.prompt_token_ids), num_wanted(request)) for request in requests}) == 1,
        )


def num_wanted(request: BenchRequest) -> int:
    """Tokens of each of a request's samples."""
    return request.params.max_tokens or 1


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


def process_age_s() -> float:
    """Seconds since this process was started, its interpreter's start included."""
    # The command's name, in brackets, may hold spaces; the start time is the twentieth field after it.
    started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def cold_request(requests: Sequence[BenchRequest]) -> BenchRequest:
    """One token from a short prompt: what a first answer takes at least."""
    first = requests[0]
    params = dataclasses.replace(first.params, max_tokens=1, n=1)
    return BenchRequest(first.prompt_token_ids[-COLD_PROMPT_TOKENS:], params)


def warm_up_requests(requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    """As `vattention bench throughput`: short prompts turned round, which put no prefix of the work in a cache."""
    return [
        BenchRequest(
            list(request.prompt_token_ids[:WARM_UP_PROMPT_TOKENS])[::-1],
            dataclasses.replace(request.params, max_tokens=WARM_UP_OUTPUT_TOKENS),
        )
        for request in requests[:WARM_UP_REQUESTS]
    ]


def measure(engine: Engine, requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """Complete the requests; figures as `vattention.bench.throughput.Throughput` has them, and the first tokens.

    Raises:
        RuntimeError: the engine made another number of tokens than was asked for.
    """
    rss_before = resident_nbytes()
    start = time.perf_counter()
    outputs = engine.complete(requests)
    elapsed = time.perf_counter() - start
    _check(requests, outputs)
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum(len(sample.token_ids) for samples in outputs for sample in samples)
    firsts = [min(sample.times[0] for sample in samples) - start for samples in outputs]
    gaps = [b - a for samples in outputs for sample in samples for a, b in pairwise(sample.times)]
    ttft_p50, ttft_p99 = np.percentile(firsts, (50, 99)).tolist()
    itl_p50, itl_p99 = np.percentile(gaps, (50, 99)).tolist() if gaps else (None, None)
    return {
        "elapsed_s": elapsed,
        "prompt_tokens_per_s": num_prompt / elapsed,
        "output_tokens_per_s": num_output / elapsed,
        "total_tokens_per_s": (num_prompt + num_output) / elapsed,
        "ttft_p50_s": ttft_p50,
        "ttft_p99_s": ttft_p99,
        "itl_p50_s": itl_p50,
        "itl_p99_s": itl_p99,
        "peak_rss_bytes": peak_resident_nbytes(),
        "rss_before_bytes": rss_before,
        "num_requests": len(requests),
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "first_request_token_ids": list(outputs[0][0].token_ids),
        "settings": engine.settings,
        "versions": {name: version(name) for name in engine.packages},
    }


def _check(requests: Sequence[BenchRequest], outputs: Sequence[Sequence[Sample]]) -> None:
    for index, (request, samples) in enumerate(zip(requests, outputs, strict=True)):
        counts = [len(sample.token_ids) for sample in samples]
        if counts != [num_wanted(request)] * request.params.n:
            raise RuntimeError(
                f"request {index} got {counts} tokens, not {request.params.n} times {num_wanted(request)}"
            )


def forget_peak() -> None:
    """Let the peak of resident memory begin anew, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def idle_cpu_share(idle_s: float) -> float:
    """Seconds of processor time that this process uses per second of having nothing to do."""
    time.sleep(SPINNING_S)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(idle_s)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / idle_s


def do(engine: Engine, requests: Sequence[BenchRequest], idle_s: float, *, first: bool) -> dict[str, Any]:
    """One workload, after a warm-up.

    Args:
        idle_s: seconds to measure having nothing to do in; not measured if 0.
        first: of this process. The time to its first token is taken, and the peak of memory has the loading in it;
            later ones have their own peak.
    """
    engine.prepare(Load.of(requests))
    cold_start = None
    if first:
        engine.complete([cold_request(requests)])
        cold_start = process_age_s()
    else:
        forget_peak()
    engine.complete(warm_up_requests(requests))
    figures = measure(engine, requests)
    idle = {"idle_cpu_share": idle_cpu_share(idle_s)} if idle_s else {}
    return {"cold_start_s": cold_start, **figures, **idle}


def drive(build: Callable[[argparse.Namespace], Engine], parser: argparse.ArgumentParser) -> None:
    """The main function of an engine's script: work comes in and figures go out as lines of JSON at input.

    Args:
        parser: knows the engine's own options; the model and the size of the work are added here.
    """
    parser.add_argument("model")
    parser.add_argument("--longest", type=int, required=True, help="tokens of the longest prompt with its output")
    engine = build(parser.parse_args())
    try:
        for number, line in enumerate(sys.stdin):
            job = json.loads(line)
            requests = parse_requests(map(json.dumps, job["requests"]), "the work")
            if not all(request.params.ignore_eos for request in requests):
                raise SystemExit(
                    "every request needs ignore_eos, so that all engines generate the same number of tokens"
                )
            figures = do(engine, requests, job["idle_s"], first=number == 0)
            # Input is a socket that is written to as well: libraries print to output.
            os.write(sys.stdin.fileno(), json.dumps(figures).encode() + b"\n")
    finally:
        engine.close()
