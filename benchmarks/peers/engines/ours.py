"""vattention, through the engine that its server and `LLM` run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.engines.driver import Load, Sample, drive
from vattention.bench.workload import BenchRequest
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine


class Ours:
    """Requests in, and one step after another until all are done."""

    packages = ("vattention", "torch", "transformers")

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._engine = LLMEngine.from_config(EngineConfig(model=model, skip_tokenizer_init=True, **settings))

    def prepare(self, load: Load) -> None: ...

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        outputs = [[Sample() for _ in range(request.params.n)] for request in requests]
        for index, request in enumerate(requests):
            self._engine.add_request(
                str(index), {"prompt_token_ids": list(request.prompt_token_ids)}, request.params
            )
        while self._engine.has_unfinished_requests():
            stepped = self._engine.step()
            now = time.perf_counter()
            for output in stepped:
                if output.error is not None:
                    raise output.error
                for completion in output.outputs:
                    sample = outputs[int(output.request_id)][completion.index]
                    sample.extend(completion.token_ids[len(sample.token_ids) :], now)
        return outputs

    def close(self) -> None:
        self._engine.close()


def build(arguments: argparse.Namespace) -> Ours:
    return Ours(
        arguments.model,
        {
            "kv_layout": arguments.kv_layout,
            "enable_prefix_caching": arguments.prefix_caching,
            "quantization": arguments.quantization,
        },
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure vattention.")
    options.add_argument("--kv-layout", default="per-layer")
    options.add_argument("--prefix-caching", action="store_true")
    options.add_argument("--quantization")
    drive(build, options)
