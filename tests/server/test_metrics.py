from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Live
from tests.server.fake_engine import FakeEngine
from vattention.engine.stats import FinishedStats, StepStats
from vattention.outputs import RequestMetrics
from vattention.server.metrics import EngineMetrics, count_buckets


def scrape(server: Live) -> dict[str, float]:
    """Sample name, with its labels but the model's and the engine's, to value."""
    text = httpx.get(server.url + "/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not family.name.startswith("process_"):
                assert (labels.pop("model_name"), labels.pop("engine")) == ("fake", "0")
            found[sample.name + (str(labels) if labels else "")] = sample.value
    return found


def test_counts_tokens_and_requests(server: Live) -> None:
    with server.client() as client:
        client.completions.create(model="fake", prompt="Hello", max_tokens=9)
        client.completions.create(model="fake", prompt="say(Hi)", n=2)
    now = scrape(server)
    assert now["vllm:prompt_tokens_total"] == 6 + 8
    assert now["vllm:generation_tokens_total"] == 9 + 3
    assert now["vllm:request_success_total{'finished_reason': 'length'}"] == 1
    assert now["vllm:request_success_total{'finished_reason': 'stop'}"] == 1
    assert now["vllm:request_success_total{'finished_reason': 'abort'}"] == 0
    assert now["vllm:num_requests_running"] == 0
    assert now["vllm:time_to_first_token_seconds_count"] == 2
    assert now["vllm:inter_token_latency_seconds_count"] == 8 + 2
    assert now["vllm:e2e_request_latency_seconds_count"] == 2
    assert now["vllm:request_prompt_tokens_sum"] == 14
    assert now["vllm:request_params_n_sum"] == 3
    assert now["vllm:request_max_num_generation_tokens_sum"] == 9 + 3
    assert now["vllm:request_num_preemptions_count"] == 2


def test_gauges_are_read_at_the_scrape(server: Live) -> None:
    with server.client() as client:
        client.completions.create(model="fake", prompt="Hello")
    idle = scrape(server)
    assert idle["vattention:kv_reserved_bytes"] == 2**40
    assert idle["vattention:kv_limit_bytes"] == 2**20
    assert idle["vattention:kv_warm_bytes"] == 4096
    assert {f"vattention:kv_{n}_bytes" for n in ("mapped", "live", "token", "shared")} <= idle.keys()
    server.engine.running["x"] = server.engine.submitted[0]
    busy = scrape(server)
    assert busy["vllm:num_requests_running"] == 1
    assert busy["vattention:kv_live_bytes"] == 6 * 1024
    assert math.isclose(busy["vllm:kv_cache_usage_perc"], 6 * 1024 / 2**20)
    server.engine.running.clear()


def test_speaks_openmetrics_to_those_who_ask(server: Live) -> None:
    response = httpx.get(server.url + "/metrics", headers={"Accept": "application/openmetrics-text"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_each_app_has_its_own_figures() -> None:
    one, other = EngineMetrics(FakeEngine(), "a"), EngineMetrics(FakeEngine(), "a")
    one.on_step(step(num_preemptions=3))
    assert value(one, "vllm:num_preemptions_total") == 3
    assert value(other, "vllm:num_preemptions_total") == 0


def test_a_step_counts_all_its_tokens() -> None:
    metrics = EngineMetrics(FakeEngine(), "a")
    metrics.on_step(step(num_prompt_tokens=100, num_generated_tokens=4))
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 104


def test_prefix_cache_is_counted_in_tokens() -> None:
    metrics = EngineMetrics(FakeEngine(), "a")
    metrics.on_step(step(num_looked_up_tokens=100, num_cached_tokens=64))
    metrics.on_step(step(num_looked_up_tokens=10, num_cached_tokens=0))
    assert value(metrics, "vllm:prefix_cache_queries_total") == 110
    assert value(metrics, "vllm:prefix_cache_hits_total") == 64


def test_prompts_are_counted_by_where_they_came_from() -> None:
    metrics = EngineMetrics(FakeEngine(), "a")
    metrics.on_step(step(num_prompt_tokens=36, num_looked_up_tokens=100, num_cached_tokens=64))
    times = RequestMetrics(10.0, num_preemptions=2)
    metrics.on_finished(finished(times, num_prompt_tokens=100, num_cached_tokens=64))
    assert value(metrics, "vllm:prompt_tokens_total") == 100
    assert value(metrics, "vllm:prompt_tokens_cached_total") == 64
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_compute") == 36
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 64
    assert value(metrics, "vllm:request_prefill_kv_computed_tokens_sum") == 36
    assert value(metrics, "vllm:request_num_preemptions_sum") == 2


@pytest.mark.parametrize(("options", "block_size"), [({}, None), ({"kv": "paged", "block_size": 32}, "32")])
def test_the_caches_options(options: dict[str, Any], block_size: str | None) -> None:
    engine = FakeEngine()
    engine.config = replace(engine.config, swap_space="/var/tmp:1GiB", **options)
    [family] = [f for f in EngineMetrics(engine, "a").registry.collect() if f.name == "vllm:cache_config_info"]
    [sample] = family.samples
    assert sample.value == 1
    assert sample.labels["kv"] == options.get("kv", "virtual")
    assert sample.labels["enable_prefix_caching"] == "True"
    assert sample.labels["swap_space"] == "/var/tmp:1GiB"
    assert sample.labels.get("block_size") == block_size


def test_phases_of_a_request() -> None:
    metrics = EngineMetrics(FakeEngine(), "a")
    metrics.on_finished(finished(RequestMetrics(10.0, 11.0, 13.0, 18.0), num_generated_tokens=12, num_sequences=2))
    expected = {
        "request_queue_time": 1.0,
        "request_prefill_time": 2.0,
        "request_decode_time": 5.0,
        "request_inference_time": 7.0,
        "e2e_request_latency": 8.0,
        "request_time_per_output_token": 1.0,
    }
    for name, seconds in expected.items():
        assert value(metrics, f"vllm:{name}_seconds_sum") == seconds, name


def test_a_request_that_never_started_has_no_phases() -> None:
    metrics = EngineMetrics(FakeEngine(), "a")
    metrics.on_finished(finished(RequestMetrics(10.0, None, None, 12.0), finish_reason="abort"))
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 2.0
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0
    assert value(metrics, "vllm:request_params_max_tokens_count") == 0


def test_buckets_of_counts() -> None:
    assert count_buckets(1) == [1]
    assert count_buckets(60) == [1, 2, 5, 10, 20, 50]
    assert count_buckets(100) == [1, 2, 5, 10, 20, 50, 100]


def step(**changes: Any) -> StepStats:
    values: dict[str, Any] = {
        "num_prompt_tokens": 0,
        "num_looked_up_tokens": 0,
        "num_cached_tokens": 0,
        "num_generated_tokens": 0,
        "num_preemptions": 0,
        "duration_s": 0.1,
        "num_running": 0,
        "num_waiting": 0,
        "times_to_first_token_s": (),
        "inter_token_latencies_s": (),
    }
    return StepStats(**values | changes)


def finished(metrics: RequestMetrics, **changes: Any) -> FinishedStats:
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "num_prompt_tokens": 3,
        "num_generated_tokens": 0,
        "num_longest_tokens": 0,
        "num_cached_tokens": 0,
        "metrics": metrics,
        "num_sequences": 1,
        "n": 1,
        "max_tokens": None,
    }
    return FinishedStats(**values | changes)


def value(metrics: EngineMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "a", "engine": "0", **labels})
