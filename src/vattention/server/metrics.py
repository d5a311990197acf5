"""Prometheus metrics: vLLM's names where they mean the same, and the memory figures under ours.

Counters and histograms are fed by the engine's steps; gauges are read when somebody scrapes, so that they are
right while the engine sleeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vattention.engine.stats import FinishedStats, StepStats
from vattention.server.engine import ServedEngine

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SAMPLES = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)

_LABELS = ("model_name", "engine")
_ENGINE = "0"
"""vLLM numbers its engines, and its dashboards choose by that label; here there is one."""

FINISH_REASONS = ("stop", "length", "abort", "error")

_ACCOUNTS = {
    "reserved_nbytes": "Virtual addresses reserved for the KV cache, with or without memory behind them.",
    "limit_nbytes": "The most physical memory that the KV cache may use.",
    "mapped_nbytes": "Physical memory in use by the KV cache, each page counted once.",
    "live_nbytes": "KV cache memory that running sequences cannot do without, each page counted once.",
    "token_nbytes": "Bytes of running sequences' tokens, counted once per sequence.",
    "warm_nbytes": "KV cache memory of cached prefixes and released slots, kept until somebody needs it.",
    "shared_nbytes": "Memory that running sequences save by sharing pages.",
}


def count_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`, as vLLM buckets counts of tokens."""
    return [
        digit * 10**power
        for power in range(len(str(largest)))
        for digit in (1, 2, 5)
        if digit * 10**power <= largest
    ]


class EngineMetrics:
    """Listens to an engine and keeps what Prometheus asks for in a registry of its own."""

    def __init__(self, engine: ServedEngine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        tokens = count_buckets(engine.max_model_len)

        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens, from the prefix cache or computed, also again after a preemption."
        )
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Of them, those from the prefix cache.")
        by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their keys and values came from.",
            [*_LABELS, "source"],
            registry=self.registry,
        )
        self._local_compute = by_source.labels(model_name, _ENGINE, "local_compute")
        self._local_cache_hit = by_source.labels(model_name, _ENGINE, "local_cache_hit")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Tokens that the prefix cache was asked for."
        )
        self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Tokens that the prefix cache had.")
        self._preemptions = self._counter(
            "vllm:num_preemptions", "Sequences whose memory was taken, to be computed again."
        )
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*_LABELS, "finished_reason"],
            registry=self.registry,
        )
        self._finished = {reason: success.labels(model_name, _ENGINE, reason) for reason in FINISH_REASONS}

        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed per step.", _STEP_TOKENS
        )
        self._first_token_s = self._histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token.", _FIRST_TOKEN_S
        )
        self._between_tokens_s = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a sequence.", _BETWEEN_TOKENS_S
        )
        self._per_token_s = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after its first.",
            _BETWEEN_TOKENS_S,
        )
        self._whole_s = self._histogram(
            "vllm:e2e_request_latency_seconds", "Time from a request's arrival to its end.", _REQUEST_S
        )
        self._queue_s = self._histogram(
            "vllm:request_queue_time_seconds", "Time from a request's arrival to its first step.", _REQUEST_S
        )
        self._inference_s = self._histogram(
            "vllm:request_inference_time_seconds", "Time from a request's first step to its end.", _REQUEST_S
        )
        self._prefill_s = self._histogram(
            "vllm:request_prefill_time_seconds",
            "Time from a request's first step to its first token.",
            _REQUEST_S,
        )
        self._decode_s = self._histogram(
            "vllm:request_decode_time_seconds", "Time from a request's first token to its end.", _REQUEST_S
        )
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", tokens
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated per request, all samples together.", tokens
        )
        self._request_longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of a request's longest sample.", tokens
        )
        self._request_computed_tokens = self._histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens per request that the prefix cache did not have.",
            tokens,
        )
        self._request_preemptions = self._histogram(
            "vllm:request_num_preemptions", "How often a request's sequences lost their memory.", _PREEMPTIONS
        )
        self._request_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "max_tokens of requests that name it.", tokens
        )
        self._request_n = self._histogram("vllm:request_params_n", "Samples per request.", _SAMPLES)

        self.registry.register(_Gauges(engine, model_name))
        ProcessCollector(registry=self.registry)
        engine.add_listener(self)

    def on_step(self, stats: StepStats) -> None:
        self._prompt_tokens.inc(stats.num_prompt_tokens + stats.num_cached_tokens)
        self._cached_tokens.inc(stats.num_cached_tokens)
        self._local_compute.inc(stats.num_prompt_tokens)
        self._local_cache_hit.inc(stats.num_cached_tokens)
        self._generation_tokens.inc(stats.num_generated_tokens)
        self._prefix_queries.inc(stats.num_looked_up_tokens)
        self._prefix_hits.inc(stats.num_cached_tokens)
        self._preemptions.inc(stats.num_preemptions)
        self._step_tokens.observe(stats.num_prompt_tokens + stats.num_generated_tokens)
        for seconds in stats.times_to_first_token_s:
            self._first_token_s.observe(seconds)
        for seconds in stats.inter_token_latencies_s:
            self._between_tokens_s.observe(seconds)

    def on_finished(self, stats: FinishedStats) -> None:
        self._finished[stats.finish_reason].inc()
        self._request_prompt_tokens.observe(stats.num_prompt_tokens)
        self._request_generation_tokens.observe(stats.num_generated_tokens)
        self._request_longest.observe(stats.num_longest_tokens)
        self._request_computed_tokens.observe(stats.num_prompt_tokens - stats.num_cached_tokens)
        self._request_preemptions.observe(stats.metrics.num_preemptions)
        self._request_n.observe(stats.n)
        if stats.max_tokens is not None:
            self._request_max_tokens.observe(stats.max_tokens)
        self._time(stats)

    def _time(self, stats: FinishedStats) -> None:
        """Observe the phases that the request reached: an aborted one may have stopped in any of them."""
        times = stats.metrics
        start, first, end = times.first_scheduled_time, times.first_token_time, times.finished_time
        if end is not None:
            self._whole_s.observe(end - times.arrival_time)
        if start is not None:
            self._queue_s.observe(start - times.arrival_time)
        if start is not None and end is not None:
            self._inference_s.observe(end - start)
        if start is not None and first is not None:
            self._prefill_s.observe(first - start)
        if first is not None and end is not None:
            self._decode_s.observe(end - first)
            per_sample = stats.num_generated_tokens / stats.num_sequences
            if per_sample > 1:
                self._per_token_s.observe((end - first) / (per_sample - 1))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(self._model_name, _ENGINE)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self.registry, buckets=buckets).labels(
            self._model_name, _ENGINE
        )


class _Gauges(Collector):
    """The engine's present state, read at the scrape."""

    def __init__(self, engine: ServedEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        now = self._engine.statistics()
        accounts = now.accounts
        usage = accounts.live_nbytes / accounts.limit_nbytes if accounts.limit_nbytes > 0 else 0.0
        yield self._cache_config()
        yield self._gauge("vllm:num_requests_running", "Sequences that run.", now.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", now.num_waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the KV cache's memory limit in use by running sequences, from 0 to 1.",
            usage,
        )
        yield self._gauge(
            "vllm:num_requests_swapped", "Of the waiting sequences, those in the swap space.", now.num_swapped
        )
        yield self._gauge("vattention:swap_used_bytes", "Swap space in use.", now.swapped_nbytes)
        yield self._gauge("vattention:swap_limit_bytes", "Swap space there may be.", now.swap_space_nbytes)
        for field in fields(accounts):
            name = field.name.removesuffix("_nbytes")
            yield self._gauge(f"vattention:kv_{name}_bytes", _ACCOUNTS[field.name], getattr(accounts, field.name))

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise call `collect` to learn the names."""
        return ()

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric([self._model_name, _ENGINE], value)
        return family

    def _cache_config(self) -> Metric:
        """vLLM's metric of the cache's options, with what they are here: blocks only where there are any."""
        config = self._engine.config
        options = {
            "kv": config.kv,
            "kv_layout": config.kv_layout,
            "kv_memory": config.kv_memory,
            "page_size": config.page_size,
            "enable_prefix_caching": config.caches_prefixes,
            "swap_space": config.swap_space,
        }
        if config.kv == "paged":
            options["block_size"] = config.block_size
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's options.", labels=[*_LABELS, *options])
        family.add_metric([self._model_name, _ENGINE, *map(str, options.values())], 1)
        return family
