"""transformers' `generate_batch`: continuous batching over a paged KV cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.engines.driver import Load, Sample, drive, num_wanted
from vattention.bench.workload import BenchRequest

PAGE_TOKENS = 256
NEVER = -1
"""As end token: none."""


class ContinuousBatches:
    """A manager per call, as `generate_batch` has; unlike it, with an output length for each request."""

    packages = ("transformers", "torch")

    def __init__(self, model: Any) -> None:
        self.settings: dict[str, Any] = {"page_size": PAGE_TOKENS, "max_batch_tokens": 2048}
        self._model = model

    def prepare(self, load: Load) -> None:
        # Left open, the number of blocks is made to fill a share of the machine's memory.
        self.settings["num_blocks"] = load.num_sequences * (load.longest // PAGE_TOKENS + 2)

    @torch.no_grad()
    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        params = requests[0].params
        sampling = {} if params.greedy else {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        generation = GenerationConfig(
            max_new_tokens=max(map(num_wanted, requests)),
            do_sample=not params.greedy,
            num_return_sequences=params.n,
            pad_token_id=0,
            eos_token_id=NEVER,
            **sampling,
        )
        config = ContinuousBatchingConfig(allow_block_sharing=False, **self.settings)
        found: dict[str, Any] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, warmup=False
        ) as manager:
            for index, request in enumerate(requests):
                manager.add_request(
                    list(request.prompt_token_ids),
                    request_id=str(index),
                    max_new_tokens=num_wanted(request),
                    record_timestamps=True,
                )
            while len(found) < len(requests) * params.n:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation thread ended before all requests were done")
                elif result.error is not None:
                    raise RuntimeError(f"request {result.request_id}: {result.error}")
                elif result.is_finished():
                    found[result.request_id] = result
        return [[_sample(found[name]) for name in _names(index, params.n)] for index in range(len(requests))]

    def close(self) -> None: ...


def _names(index: int, n: int) -> list[str]:
    return [str(index), *(f"{index}__child#{child}" for child in range(n - 1))]


def _sample(result: Any) -> Sample:
    return Sample(list(result.generated_tokens), list(result.timestamps))


def build(arguments: argparse.Namespace) -> ContinuousBatches:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", attn_implementation="sdpa").eval()
    return ContinuousBatches(model)


if __name__ == "__main__":
    drive(build, argparse.ArgumentParser(description="Measure transformers' generate_batch."))
