"""OpenVINO GenAI's continuous batching pipeline."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.peers.engines.driver import Load, Sample, drive, num_threads, num_wanted
from benchmarks.peers.environments import KV_CACHE_GB
from vattention.bench.workload import BenchRequest


class OpenVino:
    packages = ("openvino-genai", "openvino")

    def __init__(self, model: str, kv_precision: str, prefix_caching: bool) -> None:
        scheduling = {
            "cache_size": KV_CACHE_GB,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": prefix_caching,
        }
        properties = {
            "KV_CACHE_PRECISION": kv_precision,
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads(),
        }
        self.settings: dict[str, Any] = {**scheduling, **properties}
        config = genai.SchedulerConfig()
        for name, value in scheduling.items():
            setattr(config, name, value)
        self._pipeline = genai.ContinuousBatchingPipeline(model, config, "CPU", properties)
        self._num_submitted = 0

    def prepare(self, load: Load) -> None: ...

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        outputs: list[dict[int, Sample]] = [{} for _ in requests]
        handles = [self._submit(request) for request in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, samples in zip(handles, outputs, strict=True):
                while handle.can_read():
                    for index, output in handle.read().items():
                        samples.setdefault(index, Sample()).extend(output.generated_ids, now)
        return [list(samples.values()) for samples in outputs]

    def close(self) -> None: ...

    def _submit(self, request: BenchRequest) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_wanted(request)
        config.ignore_eos = True
        config.num_return_sequences = request.params.n
        config.do_sample = not request.params.greedy
        if config.do_sample:
            config.temperature = request.params.temperature
            config.top_p = 1.0
        ids = openvino.Tensor(np.array([request.prompt_token_ids], dtype=np.int64))
        self._num_submitted += 1
        return self._pipeline.add_request(self._num_submitted, ids, config)


def build(arguments: argparse.Namespace) -> OpenVino:
    return OpenVino(arguments.model, arguments.kv_precision, arguments.prefix_caching)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure OpenVINO GenAI.")
    options.add_argument("--kv-precision", default="bf16", choices=("bf16", "f16", "u8"))
    options.add_argument("--prefix-caching", action="store_true")
    drive(build, options)
